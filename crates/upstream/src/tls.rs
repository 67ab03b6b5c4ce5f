//! What https upstreams are checked against.

use std::sync::{Arc, OnceLock};

use evergate_core::config::Roots;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

/// The trust of one upstream, made ready at the first connection: reading the system's store takes milliseconds that a
/// worker without https upstreams should not spend.
#[derive(Debug)]
pub struct Trust {
    roots: Roots,
    /// PEM text for `Roots::File`.
    pem: Option<String>,
    ready: OnceLock<Result<Arc<ClientConfig>, String>>,
}

impl Trust {
    /// Trust in `roots`; `pem` is the content of the file that `Roots::File` names.
    #[must_use]
    pub fn new(roots: Roots, pem: Option<String>) -> Self {
        Self { roots, pem, ready: OnceLock::new() }
    }

    /// Whether a connection could be checked against it.
    ///
    /// # Errors
    /// Says what is wrong with the roots.
    pub fn check(&self) -> Result<(), String> {
        self.config().map(drop)
    }

    /// The client configuration: TLS 1.2 and 1.3, HTTP/1.1 only.
    pub(crate) fn config(&self) -> Result<Arc<ClientConfig>, String> {
        self.ready.get_or_init(|| self.build()).clone()
    }

    fn build(&self) -> Result<Arc<ClientConfig>, String> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("the TLS library refuses its own defaults: {error}"))?
            .with_root_certificates(self.store()?)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn store(&self) -> Result<RootCertStore, String> {
        let mut store = RootCertStore::empty();
        match &self.roots {
            Roots::Bundled => store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            Roots::System => {
                let found = rustls_native_certs::load_native_certs();
                store.add_parsable_certificates(found.certs);
                if store.is_empty() {
                    return Err("the system's certificate store holds no usable root".into());
                }
            }
            Roots::File(path) => {
                let pem = self.pem.as_deref().ok_or_else(|| format!("the content of {path} is missing"))?;
                for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                    let certificate = certificate.map_err(|error| format!("{path} is not PEM: {error:?}"))?;
                    store.add(certificate).map_err(|error| format!("{path} holds an unusable certificate: {error}"))?;
                }
                if store.is_empty() {
                    return Err(format!("{path} holds no certificate"));
                }
            }
        }
        Ok(store)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bundled_roots_make_a_configuration() {
        assert!(Trust::new(Roots::Bundled, None).config().is_ok());
    }

    #[test]
    fn an_empty_file_is_named() {
        let trust = Trust::new(Roots::File("ca.pem".into()), Some(String::new()));
        assert!(trust.config().unwrap_err().contains("ca.pem holds no certificate"));
    }
}
