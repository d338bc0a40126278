//! Who is who in the cluster: one certificate authority, for the API server and for everybody who speaks to it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::json;

use super::isolation::{BRIDGE_ADDRESS, SERVICE_ADDRESS};

/// Names that certificates of the API server are asked for by.
const SERVER_NAMES: [&str; 7] = [
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "127.0.0.1",
    SERVICE_ADDRESS,
    BRIDGE_ADDRESS,
];

/// The authority, and the directory with what it made.
#[derive(Debug)]
pub(crate) struct Authority {
    dir: PathBuf,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
struct Identity {
    certificate: String,
    key: String,
}

impl Authority {
    /// A new one, with `ca.crt`, `server.crt`, `server.key`, and `accounts.key` and `accounts.pub` for the tokens of
    /// service accounts.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let key = KeyPair::generate().context("make a key")?;
        let mut params = CertificateParams::new([]).context("make a certificate")?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(DnType::CommonName, "zpod-e2e");
        let certificate = params.self_signed(&key).context("sign a certificate")?.pem();
        let authority = Self { dir: dir.to_owned(), certificate, issuer: Issuer::new(params, key) };

        let server = authority.issue(&SERVER_NAMES, "kube-apiserver", None, ExtendedKeyUsagePurpose::ServerAuth)?;
        let accounts = KeyPair::generate().context("make a key")?;
        authority.write("ca.crt", &authority.certificate)?;
        authority.write("server.crt", &server.certificate)?;
        authority.write("server.key", &server.key)?;
        authority.write("accounts.key", &accounts.serialize_pem())?;
        authority.write("accounts.pub", &accounts.public_key_pem())?;
        Ok(authority)
    }

    /// A file of it.
    pub(crate) fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Writes the kubeconfig of a user; RBAC knows it by its name and group.
    pub(crate) fn kubeconfig(&self, file: &str, user: &str, group: Option<&str>) -> Result<PathBuf> {
        let identity = self.issue(&[], user, group, ExtendedKeyUsagePurpose::ClientAuth)?;
        let encode = |text: &str| BASE64_STANDARD.encode(text);
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{
                "name": "zpod",
                "cluster": {
                    "server": format!("https://{SERVICE_ADDRESS}:443"),
                    "certificate-authority-data": encode(&self.certificate),
                },
            }],
            "users": [{
                "name": user,
                "user": {
                    "client-certificate-data": encode(&identity.certificate),
                    "client-key-data": encode(&identity.key),
                },
            }],
            "contexts": [{ "name": "zpod", "context": { "cluster": "zpod", "user": user } }],
            "current-context": "zpod",
        });
        self.write(file, &config.to_string())
    }

    fn issue(
        &self,
        names: &[&str],
        common_name: &str,
        organization: Option<&str>,
        purpose: ExtendedKeyUsagePurpose,
    ) -> Result<Identity> {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).context("make a certificate")?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        params.distinguished_name.push(DnType::CommonName, common_name);
        if let Some(group) = organization {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        let key = KeyPair::generate().context("make a key")?;
        let certificate = params.signed_by(&key, &self.issuer).context("sign a certificate")?;
        Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}
