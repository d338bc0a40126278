//! The unix socket on which the CSI services are served.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use zpod_proto::csi::controller_server::ControllerServer;
use zpod_proto::csi::group_controller_server::GroupControllerServer;
use zpod_proto::csi::identity_server::IdentityServer;
use zpod_proto::csi::node_server::NodeServer;

use crate::csi::{ControllerService, GroupControllerService, IdentityService, NodeService};

/// How long running calls get to finish when the process is told to end. Longer than any of them takes; each of them
/// can be cut short without harm.
const GRACE: Duration = Duration::from_secs(40);
/// The same for a controller in a cluster: it has written down what is wanted, and waits for a node only to tell.
const CONTROLLER_GRACE: Duration = Duration::from_secs(5);

/// A socket of ours, removed when dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    inode: u64,
    listener: Option<UnixListener>,
}

/// The path of an endpoint: `unix:///path`, `unix:/path`, or a path.
///
/// # Errors
/// When it is none of these.
pub fn endpoint_path(endpoint: &str) -> Result<PathBuf, String> {
    let path = endpoint.strip_prefix("unix://").or_else(|| endpoint.strip_prefix("unix:")).unwrap_or(endpoint);
    let path = Path::new(path);
    if path.is_absolute() && !endpoint.contains("://") | endpoint.starts_with("unix://") {
        Ok(path.to_owned())
    } else {
        Err(format!("{endpoint:?} is not an endpoint: use unix:///path or an absolute path"))
    }
}

impl Socket {
    /// Binds the socket: mode 0600, in a directory that is made with mode 0700 where it is missing. A stale socket is
    /// replaced.
    ///
    /// # Errors
    /// When another process serves it, or something else is at the path.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(io::Error::new(ErrorKind::AlreadyExists, "there is a file, and it is not a socket"));
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(io::Error::new(ErrorKind::AddrInUse, "another process serves this socket"));
            }
            Ok(_) | Err(_) => {}
        }
        // Bound under another name and renamed: at no moment can anybody connect who may not.
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&fresh)?;
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600))?;
        let inode = fs::symlink_metadata(&fresh)?.ino();
        fs::rename(&fresh, path)?;
        Ok(Self { path: path.to_owned(), inode, listener: Some(listener) })
    }

    /// What takes its connections, once. The socket stays until it is dropped.
    pub(crate) fn listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Not one that a successor has put in its place.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What is served on one socket.
#[derive(Debug)]
pub struct Services {
    /// Always there.
    pub identity: IdentityService,
    /// Of the controller.
    pub controller: Option<ControllerService>,
    /// Of the controller too.
    pub groups: Option<GroupControllerService>,
    /// Of the node.
    pub node: Option<NodeService>,
}

/// Serves until `end`, then lets running calls finish.
///
/// # Errors
/// When the transport fails.
pub async fn serve(
    mut socket: Socket,
    services: Services,
    end: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let Some(listener) = socket.listener.take() else { return Ok(()) };
    let grace = if services.node.is_some() { GRACE } else { CONTROLLER_GRACE };
    let (ended, mut told) = tokio::sync::watch::channel(false);
    let server = Server::builder()
        .add_service(IdentityServer::new(services.identity))
        .add_optional_service(services.controller.map(ControllerServer::new))
        .add_optional_service(services.groups.map(GroupControllerServer::new))
        .add_optional_service(services.node.map(NodeServer::new))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            let _ = told.wait_for(|ended| *ended).await;
        });
    tokio::pin!(server);
    tokio::select! {
        result = &mut server => return result,
        () = end => {}
    }
    tracing::info!("ending: running calls finish");
    let _ = ended.send(true);
    match tokio::time::timeout(grace, server).await {
        Ok(result) => result,
        Err(_) => {
            tracing::warn!("calls still running after {grace:?} are cut short; it is safe to repeat them");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_as_the_sidecars_write_them() {
        for (endpoint, want) in [("unix:///run/a.sock", "/run/a.sock"), ("unix:/a", "/a"), ("/a/b", "/a/b")] {
            assert_eq!(endpoint_path(endpoint).unwrap(), Path::new(want));
        }
        for endpoint in ["", "a.sock", "unix://a", "tcp://1.2.3.4:5", "tcp:///a"] {
            assert!(endpoint_path(endpoint).is_err(), "{endpoint}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/csi.sock");
        let first = Socket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(Socket::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(first);
        assert!(!path.exists());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let second = Socket::bind(&path).unwrap();
        drop(second);
        fs::write(&path, "precious").unwrap();
        assert_eq!(Socket::bind(&path).unwrap_err().kind(), ErrorKind::AlreadyExists);
    }
}
