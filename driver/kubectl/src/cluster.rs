use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use zpod_kubernetes::Kept;
use zpod_kubernetes::crd::{ZfsSnapshot, ZfsVolume};

use crate::Failure;
use crate::options::{Global, Named};
use crate::proxy::{Environment, Proxy};

/// Objects that are asked for at once.
const PAGE: u32 = 500;
const DRIVER: &str = "csi.zpod.storage";

/// Takes the `proxy-url` of the chosen context's cluster out of a kubeconfig.
fn take_proxy(file: &mut Kubeconfig, context: Option<&str>) -> Option<String> {
    let context = context.or(file.current_context.as_deref())?;
    let context = file.contexts.iter().find(|named| named.name == context)?.context.as_ref()?;
    let cluster = file.clusters.iter_mut().find(|named| named.name == context.cluster)?;
    cluster.cluster.as_mut()?.proxy_url.take().filter(|url| !url.is_empty())
}

/// The cluster, and the namespace that claims are looked for in.
#[derive(Clone)]
pub(crate) struct Cluster {
    pub(crate) client: Client,
    /// There but in tests.
    pub(crate) config: Option<Config>,
    /// What stands between here and the API server.
    pub(crate) proxy: Option<Proxy>,
    pub(crate) namespace: String,
    /// Where zpod is.
    pub(crate) zpod_namespace: String,
}

impl Cluster {
    /// Reads the kubeconfig as kubectl does; in a pod without one, its ServiceAccount.
    pub(crate) async fn connect(global: &Global) -> Result<Self, Failure> {
        let chosen = KubeConfigOptions { context: global.context.clone(), ..KubeConfigOptions::default() };
        let remedy = "give --kubeconfig and --context, or set KUBECONFIG; `kubectl config get-contexts` lists them";
        let wrong = |error: &dyn std::error::Error| {
            Failure::usage(format!("the kubeconfig can't be used: {}", crate::failure::with_causes(error)), remedy)
        };
        let file = match &global.kubeconfig {
            Some(path) => Kubeconfig::read_from(path),
            None => Kubeconfig::read(),
        };
        let (config, of_cluster) = match file {
            Ok(mut file) => {
                let of_cluster = take_proxy(&mut file, global.context.as_deref());
                let config = Config::from_custom_kubeconfig(file, &chosen).await.map_err(|error| wrong(&error))?;
                (config, of_cluster)
            }
            Err(error) if global.kubeconfig.is_some() || global.context.is_some() => return Err(wrong(&error)),
            Err(_) => (Config::infer().await.map_err(|error| wrong(&error))?, None),
        };
        Self::through(config, of_cluster.as_deref(), &Environment::of_process(), global)
    }

    /// By the proxy that the kubeconfig names for the cluster, or else the environment.
    fn through(
        mut config: Config,
        of_cluster: Option<&str>,
        environment: &Environment,
        global: &Global,
    ) -> Result<Self, Failure> {
        let proxy = Proxy::choose(&config.cluster_url, of_cluster, environment)?;
        config.proxy_url = None;
        let namespace = global.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = match &proxy {
            None => Client::try_from(config.clone()),
            Some(_) => crate::proxy::api_server(&config, proxy.as_ref())
                .map(|service| Client::new(service, config.default_namespace.clone())),
        };
        let client = client.map_err(|error| {
            let what = format!("the kubeconfig can't be used: {}", crate::failure::with_causes(&error));
            Failure::usage(what, "see `kubectl config view`")
        })?;
        Ok(Self { client, config: Some(config), proxy, namespace, zpod_namespace: global.zpod_namespace.clone() })
    }

    pub(crate) fn volumes(&self) -> Api<ZfsVolume> {
        Api::all(self.client.clone())
    }

    /// The volume that somebody names. Every command goes through here.
    pub(crate) async fn volume(&self, named: &Named) -> Result<ZfsVolume, Failure> {
        match named {
            Named::Id(id) => self.object(&id.to_string()).await,
            Named::Claim(name) => self.volume_of(&self.claim(name).await?).await,
        }
    }

    /// The volume that a claim is bound to.
    pub(crate) async fn volume_of(&self, claim: &PersistentVolumeClaim) -> Result<ZfsVolume, Failure> {
        self.object(&self.handle(claim).await?).await
    }

    async fn object(&self, id: &str) -> Result<ZfsVolume, Failure> {
        let volume = self.volumes().get_opt(id).await.map_err(|error| Failure::api("ZfsVolumes", &error))?;
        volume.ok_or_else(|| {
            Failure::not_found(
                format!("there is no ZfsVolume {id}"),
                "`kubectl zpod status -A` lists those there are; if the claim was made just now, try again",
            )
        })
    }

    /// A claim.
    pub(crate) async fn claim(&self, name: &str) -> Result<PersistentVolumeClaim, Failure> {
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &self.namespace);
        let claim = claims.get_opt(name).await.map_err(|error| Failure::api("PersistentVolumeClaims", &error))?;
        claim.ok_or_else(|| {
            Failure::not_found(
                format!("there is no PersistentVolumeClaim {name} in namespace {}", self.namespace),
                "-n chooses another namespace, --volume takes the id of a volume; `kubectl zpod status -A` lists what there is",
            )
        })
    }

    /// The id of a claim's volume. Whoever makes a claim may write any PersistentVolume's name into it: only the volume's
    /// own word, its `claimRef`, says whose it is.
    async fn handle(&self, claim: &PersistentVolumeClaim) -> Result<String, Failure> {
        let name = claim.metadata.name.clone().unwrap_or_default();
        let bound = claim.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|name| !name.is_empty());
        let bound = bound.ok_or_else(|| {
            Failure::not_found(
                format!("the claim {name} has no volume yet"),
                "with WaitForFirstConsumer it gets one when its first pod starts; `kubectl describe pvc` says what it waits for",
            )
        })?;
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let found = volumes.get_opt(&bound).await.map_err(|error| Failure::api("PersistentVolumes", &error))?;
        let spec = found.and_then(|volume| volume.spec).unwrap_or_default();
        let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
        let owner = spec.claim_ref.as_ref();
        let same = owner.is_some_and(|owner| {
            owner.uid.is_some()
                && owner.uid == claim.metadata.uid
                && owner.name == claim.metadata.name
                && owner.namespace.as_deref() == Some(self.namespace.as_str())
        });
        if phase != Some("Bound") || !same {
            let phase = phase.unwrap_or("Pending");
            return Err(Failure::failed(
                format!(
                    "the claim {name} names the PersistentVolume {bound}, which is not bound to it (it is {phase})"
                ),
                "the volume may be another claim's; `kubectl describe pvc` says what this one waits for",
            ));
        }
        match spec.csi {
            Some(source) if source.driver == DRIVER => Ok(source.volume_handle),
            Some(source) => Err(Failure::not_found(
                format!("the claim {name} is a volume of the driver {}, not of {DRIVER}", source.driver),
                "only volumes of zpod's StorageClasses have a pool",
            )),
            None => Err(Failure::not_found(
                format!("the PersistentVolume {bound} of claim {name} is not of any CSI driver, or is gone"),
                "only volumes of zpod's StorageClasses have a pool",
            )),
        }
    }

    /// All volumes: of one namespace's claims, or of all.
    pub(crate) async fn all_volumes(&self, everywhere: bool) -> Result<Vec<ZfsVolume>, Failure> {
        let mut all: Vec<ZfsVolume> = self.all("ZfsVolumes").await?;
        all.retain(|volume| {
            everywhere || volume.spec.claim.as_ref().is_some_and(|claim| claim.namespace == self.namespace)
        });
        Ok(all)
    }

    /// All snapshots.
    pub(crate) async fn all_snapshots(&self) -> Result<Vec<ZfsSnapshot>, Failure> {
        self.all("ZfsSnapshots").await
    }

    /// All objects of a kind.
    pub(crate) async fn all<K: Kept>(&self, what: &str) -> Result<Vec<K>, Failure> {
        let objects: Api<K> = Api::all(self.client.clone());
        let mut all = Vec::new();
        let mut page = ListParams::default().limit(PAGE);
        loop {
            let list = objects.list(&page).await.map_err(|error| Failure::api(what, &error))?;
            all.extend(list.items);
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(all),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::fake::{Answers, bound, path, volume};
    use serde_json::{Value, json};

    const CLAIM: &str = "/api/v1/namespaces/prod/persistentvolumeclaims/";

    fn answers(claim: Value, persistent: Value) -> (Answers, String) {
        let (id, object) = volume("db", json!({"phase": "Ready"}));
        let answers = Answers::default().with(&path(&id), object).with(&format!("{CLAIM}db"), claim);
        (answers.with("/api/v1/persistentvolumes/pv", persistent), id)
    }

    #[test]
    fn the_proxy_of_a_kubeconfig_is_the_one_of_the_chosen_contexts_cluster() {
        let file =
            "{contexts: [{name: a, context: {cluster: one, user: u}}, {name: b, context: {cluster: two, user: u}}],
                     clusters: [{name: one, cluster: {server: 'https://one', proxy-url: 'http://proxy:3128'}},
                                {name: two, cluster: {server: 'https://two', proxy-url: ''}}],
                     current-context: a}";
        for (context, proxy) in
            [(None, Some("http://proxy:3128")), (Some("a"), Some("http://proxy:3128")), (Some("b"), None)]
        {
            let mut file = Kubeconfig::from_yaml(file).unwrap();
            assert_eq!(take_proxy(&mut file, context).as_deref(), proxy, "{context:?}");
        }
    }

    #[tokio::test]
    async fn a_claim_is_the_volume_that_is_bound_to_it_and_no_other() {
        let (claim, persistent) = bound("db", "Filesystem");
        let named = Named::Claim("db".into());
        let (good, id) = answers(claim.clone(), persistent.clone());
        assert_eq!(good.cluster().volume(&named).await.unwrap().metadata.name, Some(id));
        for (of_claim, pointer, value) in [
            (true, "/status/phase", json!("Pending")),
            (true, "/status/phase", json!("Lost")),
            (true, "/status", json!({})),
            (true, "/metadata/uid", json!("uid-of-another")),
            (true, "/metadata/uid", Value::Null),
            (false, "/spec/claimRef/uid", json!("uid-of-another")),
            (false, "/spec/claimRef/uid", Value::Null),
            (false, "/spec/claimRef/namespace", json!("victim")),
            (false, "/spec/claimRef/name", json!("other")),
            (false, "/spec/claimRef", Value::Null),
            (false, "/spec/csi/driver", json!("other.example")),
        ] {
            let (mut claim, mut persistent) = (claim.clone(), persistent.clone());
            *(if of_claim { &mut claim } else { &mut persistent }).pointer_mut(pointer).unwrap() = value.clone();
            let failure = answers(claim, persistent).0.cluster().volume(&named).await.unwrap_err();
            assert!(failure.to_string().contains("claim db"), "{pointer} {value}: {failure}");
        }
    }

    #[tokio::test]
    async fn a_claim_that_is_named_like_a_volume_is_not_that_volume() {
        let (id, object) = volume("db", json!({"phase": "Ready"}));
        let cluster = Answers::default().with(&path(&id), object).cluster();
        let failure = cluster.volume(&Named::Claim(id.clone())).await.unwrap_err();
        assert!(failure.to_string().contains("there is no PersistentVolumeClaim"), "{failure}");
        assert!(failure.to_string().contains("--volume"), "{failure}");
        assert!(cluster.volume(&Named::Id(id.parse().unwrap())).await.is_ok());
    }
}
