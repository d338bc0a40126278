use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use zpod_admin::SERVICE_ACCOUNT;

use crate::guest::clean;

/// How long an answer of the API server stands: a token that is taken back is good for as long.
const STANDS: Duration = Duration::from_secs(60);
/// A token that is none is not asked about again at once.
const DENIED: Duration = Duration::from_secs(10);
/// No more answers are kept.
const KEPT: usize = 256;
/// No token is longer.
const MAX_TOKEN: usize = 8192;
const PATIENCE: Duration = Duration::from_secs(10);
/// Questions to the API server at the same time: in all, and for one address, whoever knocks how often.
const ASKING: usize = 8;
const ASKING_OF_PEER: usize = 2;

/// Knows whose tokens are taken: those of one ServiceAccount, made for what is asked for
/// ([`Route::audience`](zpod_admin::Route::audience)).
pub struct Tokens {
    client: Client,
    user: String,
    /// By digest of token and audience: no token is kept, and what opens one thing is not taken for another.
    known: Mutex<HashMap<[u8; 32], (Instant, bool)>>,
    asking: Semaphore,
    /// An address with many wrong tokens waits behind itself. Those that nobody waits for are forgotten.
    peers: Mutex<HashMap<IpAddr, Weak<Semaphore>>>,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Why somebody is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No token came.
    #[error(
        "the header X-Zpod-Token is missing: a token of ServiceAccount zpod-admin, made for this call on this node"
    )]
    Missing,
    /// The token is none of those.
    #[error(
        "the token is not one of ServiceAccount zpod-admin in zpod's namespace for this call on this node (audience \
         zpod.storage/<node>/<call>[/<volume>]), or it has expired; --zpod-namespace says which namespace that is, and \
         kubectl-zpod has to be of zpod-node's version"
    )]
    Denied,
    /// The API server did not say.
    #[error("the API server can't be asked about the token: {0}")]
    Unknown(String),
}

impl Tokens {
    /// Takes those of `zpod-admin` in this namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        let user = format!("system:serviceaccount:{namespace}:{SERVICE_ACCOUNT}");
        Self { client, user, known: Mutex::default(), asking: Semaphore::new(ASKING), peers: Mutex::default() }
    }

    /// Whether whoever shows this may ask for what has this audience. Without one, nothing opens it.
    ///
    /// # Errors
    /// When not, or when that is not known now.
    pub async fn check(&self, peer: IpAddr, token: Option<&[u8]>, audience: Option<&str>) -> Result<(), Refused> {
        let token = token.filter(|token| !token.is_empty()).ok_or(Refused::Missing)?;
        let text = std::str::from_utf8(token).ok().filter(|text| text.len() <= MAX_TOKEN).ok_or(Refused::Denied)?;
        let audience = audience.ok_or(Refused::Denied)?;
        let digest = digest(text, audience);
        if let Some(good) = self.remembered(&digest) {
            return if good { Ok(()) } else { Err(Refused::Denied) };
        }
        let peer = self.peer(peer);
        // None of them is ever closed.
        let _among_its_own = peer.acquire().await;
        let _among_all = self.asking.acquire().await;
        // Somebody else may have asked in the meantime.
        let good = match self.remembered(&digest) {
            Some(good) => good,
            None => {
                let good = self.ask(text, audience).await?;
                self.remember(digest, good);
                good
            }
        };
        if good { Ok(()) } else { Err(Refused::Denied) }
    }

    fn peer(&self, peer: IpAddr) -> Arc<Semaphore> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = peers.get(&peer).and_then(Weak::upgrade) {
            return known;
        }
        peers.retain(|_, turns| turns.strong_count() > 0);
        let turns = Arc::new(Semaphore::new(ASKING_OF_PEER));
        peers.insert(peer, Arc::downgrade(&turns));
        turns
    }

    fn remembered(&self, digest: &[u8; 32]) -> Option<bool> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(digest).filter(|(until, _)| Instant::now() < *until).map(|(_, good)| *good)
    }

    fn remember(&self, digest: [u8; 32], good: bool) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        known.retain(|_, (until, _)| now < *until);
        // Full of tokens that are none: those go first.
        if known.len() >= KEPT {
            known.retain(|_, (_, good)| *good);
        }
        if known.len() < KEPT {
            known.insert(digest, (now + if good { STANDS } else { DENIED }, good));
        }
    }

    async fn ask(&self, token: &str, audience: &str) -> Result<bool, Refused> {
        let review = TokenReview {
            spec: TokenReviewSpec { audiences: Some(vec![audience.into()]), token: Some(token.into()) },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answer = match tokio::time::timeout(PATIENCE, api.create(&PostParams::default(), &review)).await {
            Ok(answer) => answer.map_err(|error| Refused::Unknown(clean(&error.to_string(), 256)))?,
            Err(_) => return Err(Refused::Unknown(format!("no answer in {PATIENCE:?}"))),
        };
        let status = answer.status.unwrap_or_default();
        // An API server that does not know audiences leaves the list empty: then the token is for anything.
        let meant = status.audiences.iter().flatten().any(|meant| meant == audience);
        let user = status.user.and_then(|user| user.username);
        Ok(status.authenticated == Some(true) && meant && user.as_deref() == Some(self.user.as_str()))
    }
}

/// No audience has a zero byte in it.
fn digest(token: &str, audience: &str) -> [u8; 32] {
    Sha256::new().chain_update(audience).chain_update([0_u8]).chain_update(token).finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;
    use hyper::{Request, Response};
    use kube::client::Body;
    use serde_json::{Value, json};
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const AUDIENCE: &str = "zpod.storage/n1/doctor";
    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    async fn check(tokens: &Tokens, token: Option<&[u8]>) -> Result<(), Refused> {
        tokens.check(PEER, token, Some(AUDIENCE)).await
    }

    /// An API server that gives one answer, and counts.
    fn tokens(status: Value) -> (Tokens, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (status, count) = (status.clone(), count.clone());
            async move {
                assert_eq!(request.uri().path(), "/apis/authentication.k8s.io/v1/tokenreviews");
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let body: Value = serde_json::from_slice(&body).unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                let answer = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {},
                                    "spec": body["spec"], "status": status});
                Ok::<_, Infallible>(Response::new(Body::from(serde_json::to_vec(&answer).unwrap())))
            }
        });
        (Tokens::new(Client::new(service, "default"), "zpod-system"), asked)
    }

    fn good() -> Value {
        json!({"authenticated": true, "audiences": [AUDIENCE],
               "user": {"username": "system:serviceaccount:zpod-system:zpod-admin"}})
    }

    #[tokio::test]
    async fn a_token_of_the_account_for_the_audience_opens_and_is_asked_about_once_a_minute() {
        tokio::time::pause();
        let (tokens, asked) = tokens(good());
        for _ in 0..3 {
            check(&tokens, Some(b"t")).await.unwrap();
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        tokio::time::advance(STANDS).await;
        check(&tokens, Some(b"t")).await.unwrap();
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn nothing_else_opens() {
        let mut cases = Vec::new();
        for (path, value) in [
            ("/authenticated", json!(false)),
            ("/audiences", json!(["https://kubernetes.default.svc"])),
            ("/audiences", json!([])),
            ("/user/username", json!("system:serviceaccount:zpod-system:default")),
            ("/user/username", json!("system:serviceaccount:other:zpod-admin")),
        ] {
            let mut status = good();
            *status.pointer_mut(path).unwrap() = value;
            cases.push(status);
        }
        cases.push(json!({}));
        for status in cases {
            let (tokens, _) = tokens(status.clone());
            assert_eq!(check(&tokens, Some(b"t")).await, Err(Refused::Denied), "{status}");
        }
        let (tokens, asked) = tokens(good());
        assert_eq!(check(&tokens, None).await, Err(Refused::Missing));
        assert_eq!(check(&tokens, Some(b"")).await, Err(Refused::Missing));
        assert_eq!(check(&tokens, Some(&[0xff])).await, Err(Refused::Denied));
        assert_eq!(check(&tokens, Some(&[b'x'; MAX_TOKEN + 1])).await, Err(Refused::Denied));
        assert_eq!(asked.load(Ordering::Relaxed), 0, "the API server is not troubled with those");
    }

    #[tokio::test]
    async fn a_flood_of_bad_tokens_takes_no_memory_and_does_not_push_a_good_one_out() {
        let (tokens, _) = tokens(good());
        check(&tokens, Some(b"good")).await.unwrap();
        for n in 0..3 * KEPT {
            tokens.remember(digest(&n.to_string(), AUDIENCE), false);
        }
        assert!(tokens.known.lock().unwrap().len() <= KEPT);
        assert_eq!(tokens.remembered(&digest("good", AUDIENCE)), Some(true));
    }

    #[tokio::test]
    async fn a_token_opens_what_it_was_made_for_and_nothing_beside() {
        let (tokens, asked) = tokens(good());
        check(&tokens, Some(b"t")).await.unwrap();
        for other in ["zpod.storage/n2/doctor", "zpod.storage/n1/send/x", "zpod.storage"] {
            assert_eq!(tokens.check(PEER, Some(b"t"), Some(other)).await, Err(Refused::Denied), "{other}");
        }
        assert_eq!(asked.load(Ordering::Relaxed), 4, "an answer for one audience is none for another");
        assert_eq!(tokens.check(PEER, Some(b"t"), None).await, Err(Refused::Denied));
        assert_eq!(asked.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn an_address_that_asks_without_end_keeps_no_other_waiting() {
        // An API server that never answers about tokens of the hostile address, and always about the victim's.
        let silent = Arc::new(AtomicUsize::new(0));
        let count = silent.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let count = count.clone();
            async move {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let mut review: Value = serde_json::from_slice(&body).unwrap();
                if review["spec"]["token"] != "good" {
                    count.fetch_add(1, Ordering::Relaxed);
                    std::future::pending::<()>().await;
                }
                review["status"] = good();
                Ok::<_, Infallible>(Response::new(Body::from(serde_json::to_vec(&review).unwrap())))
            }
        });
        let tokens = Arc::new(Tokens::new(Client::new(service, "default"), "zpod-system"));
        let hostile = IpAddr::from([10, 0, 0, 1]);
        for n in 0..300 {
            let tokens = tokens.clone();
            tokio::spawn(async move { tokens.check(hostile, Some(format!("{n}").as_bytes()), Some(AUDIENCE)).await });
        }
        while silent.load(Ordering::Relaxed) < ASKING_OF_PEER {
            tokio::task::yield_now().await;
        }
        check(&tokens, Some(b"good")).await.unwrap();
        assert_eq!(silent.load(Ordering::Relaxed), ASKING_OF_PEER);
        assert_eq!(tokens.peers.lock().unwrap().len(), 2);
    }
}
