use std::time::Duration;

use kube::{Client, Config};

/// A watch is silent this long at most: the API server ends each after 5 to 10 minutes, and kube-rs before that.
const SILENCE: Duration = Duration::from_secs(295);

/// Connects to the cluster this process runs in, or that `KUBECONFIG` names.
///
/// # Errors
/// When there is no configuration, or it can't be read.
pub async fn connect() -> Result<Client, Box<dyn std::error::Error + Send + Sync>> {
    let mut config = Config::infer().await.map_err(|error| {
        format!("no cluster: neither a ServiceAccount in this pod nor a kubeconfig (KUBECONFIG) can be used: {error}")
    })?;
    config.connect_timeout = Some(Duration::from_secs(5));
    config.read_timeout = Some(SILENCE);
    Ok(Client::try_from(config)?)
}
