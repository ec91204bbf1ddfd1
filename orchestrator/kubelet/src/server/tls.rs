//! TLS of the kubelet's server: who calls.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// The API server's name as a client of kubelets.
const API_SERVER: &str = "kube-apiserver-kubelet-client";
/// Group that may do everything.
const MASTERS: &str = "system:masters";

/// Who is at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Caller {
    Allowed,
    /// A valid certificate of somebody else.
    Forbidden(String),
    Unknown,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// # Errors
/// A certificate or key cannot be used.
pub(crate) fn server_config(
    cert: &str,
    key: &str,
    client_ca: &str,
) -> Result<Arc<ServerConfig>, String> {
    let chain = certificates(cert)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|error| format!("private key: {error}"))?;
    let mut roots = RootCertStore::empty();
    for ca in certificates(client_ca)? {
        roots.add(ca).map_err(|error| format!("client CA: {error}"))?;
    }
    // Without a certificate the caller gets a 401 instead of a broken handshake.
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| format!("client CA: {error}"))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|error| error.to_string())?;
    // WebSockets need HTTP/1.1, and nothing here gains from HTTP/2.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let all = all.map_err(|error| format!("certificate: {error}"))?;
    if all.is_empty() { Err("there is no certificate in the file".to_owned()) } else { Ok(all) }
}

/// Judges by the certificate that the handshake has verified.
pub(crate) fn caller(chain: Option<&[CertificateDer<'_>]>) -> Caller {
    let Some((_, certificate)) =
        chain.and_then(|chain| X509Certificate::from_der(chain.first()?).ok())
    else {
        return Caller::Unknown;
    };
    let subject = certificate.subject();
    let name =
        subject.iter_common_name().next().and_then(|name| name.as_str().ok()).unwrap_or_default();
    let master = subject.iter_organization().any(|group| group.as_str() == Ok(MASTERS));
    if name == API_SERVER || master { Caller::Allowed } else { Caller::Forbidden(name.to_owned()) }
}

/// # Errors
/// The text is neither a name nor an address.
pub(crate) fn server_name(host: &str) -> Result<ServerName<'static>, String> {
    ServerName::try_from(host.to_owned()).map_err(|_| format!("{host} is no host name"))
}
