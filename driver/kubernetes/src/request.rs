use std::future::Future;
use std::time::Duration;

use tokio::time::error::Elapsed;
use zpod_storage::catalog::CatalogError;

/// How long one request may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Whether an HTTP status says no to the request, and asking again won't help. 429 asks for patience only.
pub fn is_refusal(code: u16) -> bool {
    matches!(code, 400..=428 | 430..=499)
}

/// Sends a request, and waits no longer than [`PATIENCE`].
pub(crate) async fn request<T>(
    what: &'static str,
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, CatalogError> {
    flatten(what, tokio::time::timeout(PATIENCE, call).await)
}

pub(crate) fn flatten<T>(
    what: &'static str,
    answer: Result<Result<T, kube::Error>, Elapsed>,
) -> Result<T, CatalogError> {
    match answer {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) if is_refusal(status.code) => {
            Err(CatalogError::Forbidden { what, reason: format!("{} ({})", status.message, status.code) })
        }
        Ok(Err(error)) => Err(CatalogError::Unavailable { what, reason: error.to_string() }),
        Err(_) => Err(CatalogError::Unavailable { what, reason: format!("no answer in {PATIENCE:?}") }),
    }
}
