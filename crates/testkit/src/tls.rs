//! TLS for both ends of a test: a certificate made on the spot, and the two configurations that use it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

const OWN_NAMES: [&str; 2] = ["localhost", "127.0.0.1"];

/// A self-signed certificate for `localhost` and `127.0.0.1` with its key. It is its own root.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Certificate, PEM.
    pub cert_pem: String,
    /// Private key, PKCS#8 PEM.
    pub key_pem: String,
    cert: CertificateDer<'static>,
    key: Vec<u8>,
}

impl Identity {
    /// Makes a new one.
    #[must_use]
    pub fn generate() -> Self {
        Self::for_names(&OWN_NAMES)
    }

    /// Makes one for other names, such as a wrong one.
    #[must_use]
    pub fn for_names(names: &[&str]) -> Self {
        Self::self_signed(names, |_| {})
    }

    /// Makes one whose time is over.
    #[must_use]
    pub fn expired() -> Self {
        Self::self_signed(&OWN_NAMES, |params| {
            params.not_before = rcgen::date_time_ymd(2020, 1, 1);
            params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        })
    }

    /// Makes one whose time is to come.
    #[must_use]
    pub fn not_valid_yet() -> Self {
        Self::self_signed(&OWN_NAMES, |params| params.not_before = rcgen::date_time_ymd(2200, 1, 1))
    }

    /// Makes one that is an authority's, as `openssl req -x509` makes them.
    #[must_use]
    pub fn authority() -> Self {
        Self::self_signed(&OWN_NAMES, be_authority)
    }

    /// Makes one, and the certificate of an authority that has the name but not the key of the one that signed it.
    #[must_use]
    pub fn of_a_namesake() -> (Self, String) {
        let key = || rcgen::KeyPair::generate().expect("a key");
        let (own, (signing, other)) = (key(), (key(), key()));
        let mut authority = params(&[]);
        be_authority(&mut authority);
        let trusted = authority.self_signed(&other).expect("an authority").pem();
        let signer = rcgen::Issuer::new(authority, signing);
        let cert = params(&OWN_NAMES).signed_by(&own, &signer).expect("a signed certificate");
        (Self::of(&cert, &own), trusted)
    }

    fn self_signed(names: &[&str], adjust: impl FnOnce(&mut rcgen::CertificateParams)) -> Self {
        let mut params = params(names);
        adjust(&mut params);
        let key = rcgen::KeyPair::generate().expect("a key");
        Self::of(&params.self_signed(&key).expect("self-signed certificate"), &key)
    }

    fn of(cert: &rcgen::Certificate, key: &rcgen::KeyPair) -> Self {
        Self { cert_pem: cert.pem(), key_pem: key.serialize_pem(), cert: cert.der().clone(), key: key.serialize_der() }
    }

    /// Writes `cert.pem` and `key.pem` into `folder` and returns their paths.
    pub fn write_to(&self, folder: &Path) -> (PathBuf, PathBuf) {
        let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
        std::fs::write(&cert, &self.cert_pem).expect("write cert.pem");
        std::fs::write(&key, &self.key_pem).expect("write key.pem");
        (cert, key)
    }

    /// The server's side, offering HTTP/1.1 only.
    pub(crate) fn server_config(&self) -> Arc<ServerConfig> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("TLS versions")
            .with_no_client_auth()
            .with_single_cert(vec![self.cert.clone()], key)
            .expect("own certificate");
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Arc::new(config)
    }

    /// The client's side, trusting this certificate only; `alpn` is what it offers.
    pub fn client_config(&self, alpn: &[&str]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.cert.clone()).expect("own certificate as root");
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect("TLS versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

fn params(names: &[&str]) -> rcgen::CertificateParams {
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    rcgen::CertificateParams::new(names).expect("names for a certificate")
}

fn be_authority(params: &mut rcgen::CertificateParams) {
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
