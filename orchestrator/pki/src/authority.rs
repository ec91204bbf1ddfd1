//! One certificate authority: made once, kept in two PEM files, signs leaf certificates.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use time::{Duration, OffsetDateTime};

/// How long an authority is valid.
const AUTHORITY_DAYS: i64 = 3650;
/// How long a leaf certificate is valid.
const LEAF_DAYS: i64 = 365;
/// Leaf certificates are made anew at the next start when they end within this time.
const RENEW_DAYS: i64 = 60;
/// Certificates are valid a little before they were made: clocks of hosts differ.
const CLOCK_SKEW: Duration = Duration::minutes(10);

/// Why a key or certificate could not be made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make certificate for {subject}")]
    Make { subject: String, source: rcgen::Error },
    #[error("{} holds no usable key or certificate; remove it together with its pair to have both made anew", path.display())]
    Parse { path: PathBuf, source: rcgen::Error },
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("write {}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
}

/// What a leaf certificate may be used for (RFC 5280 §4.2.1.12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    Client,
    Server,
    /// Server and client, as etcd members and agents need.
    Both,
}

/// Whom a leaf certificate names.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Common name: the user.
    pub user: String,
    /// Organisation: the group; `None` for a plain server certificate.
    pub group: Option<String>,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub usage: Usage,
}

impl Identity {
    /// A client certificate of `user` in `group`.
    #[must_use]
    pub fn client(user: impl Into<String>, group: Option<&str>) -> Self {
        Self {
            user: user.into(),
            group: group.map(str::to_owned),
            dns_names: Vec::new(),
            addresses: Vec::new(),
            usage: Usage::Client,
        }
    }
}

/// A certificate authority with its signing key.
pub struct Authority {
    certificate_pem: String,
    key: KeyPair,
}

impl Authority {
    /// The authority kept in `<dir>/<name>.crt` and `<name>.key`; made when neither is there.
    ///
    /// # Errors
    /// Files cannot be read or written, or hold something else.
    pub fn load_or_create(dir: &Path, name: &str, common_name: &str) -> Result<Self, Error> {
        let (cert_path, key_path) =
            (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        if cert_path.exists() && key_path.exists() {
            let key_pem = read(&key_path)?;
            let key = KeyPair::from_pem(&key_pem)
                .map_err(|source| Error::Parse { path: key_path.clone(), source })?;
            let authority = Self { certificate_pem: read(&cert_path)?, key };
            authority.issuer().map_err(|source| Error::Parse { path: cert_path, source })?;
            return Ok(authority);
        }
        let authority = Self::create(common_name)?;
        write_private(&key_path, &authority.key.serialize_pem())?;
        write_public(&cert_path, &authority.certificate_pem)?;
        Ok(authority)
    }

    /// A new authority, in memory only.
    ///
    /// # Errors
    /// Key generation fails.
    pub fn create(common_name: &str) -> Result<Self, Error> {
        let make = || -> Result<Self, rcgen::Error> {
            let mut params = CertificateParams::new(Vec::new())?;
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, common_name);
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![
                KeyUsagePurpose::KeyCertSign,
                KeyUsagePurpose::CrlSign,
                KeyUsagePurpose::DigitalSignature,
            ];
            set_validity(&mut params, AUTHORITY_DAYS);
            let key = KeyPair::generate()?;
            let certificate = params.self_signed(&key)?;
            Ok(Self { certificate_pem: certificate.pem(), key })
        };
        make().map_err(|source| Error::Make { subject: common_name.to_owned(), source })
    }

    /// The authority's own certificate, PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    fn issuer(&self) -> Result<Issuer<'_, &KeyPair>, rcgen::Error> {
        Issuer::from_ca_cert_pem(&self.certificate_pem, &self.key)
    }

    /// A new key and a certificate for it, both PEM: `(certificate, key)`.
    ///
    /// # Errors
    /// A name does not fit into a certificate.
    pub fn issue(&self, identity: &Identity) -> Result<(String, String), Error> {
        let make = || -> Result<(String, String), rcgen::Error> {
            let key = KeyPair::generate()?;
            Ok((self.certify(identity, &key)?, key.serialize_pem()))
        };
        make().map_err(|source| Error::Make { subject: identity.user.clone(), source })
    }

    /// A certificate for `identity` and a public key.
    pub(crate) fn certify(
        &self,
        identity: &Identity,
        key: &impl PublicKeyData,
    ) -> Result<String, rcgen::Error> {
        let mut params = CertificateParams::new(identity.dns_names.clone())?;
        params.subject_alt_names.extend(subject_alt_names(&identity.addresses));
        params.distinguished_name = DistinguishedName::new();
        if let Some(group) = &identity.group {
            params.distinguished_name.push(DnType::OrganizationName, group.as_str());
        }
        params.distinguished_name.push(DnType::CommonName, identity.user.as_str());
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = match identity.usage {
            Usage::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Usage::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
            Usage::Both => {
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
            }
        };
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, LEAF_DAYS);
        Ok(params.signed_by(key, &self.issuer()?)?.pem())
    }

    /// Issues into `<dir>/<name>.crt` and `<name>.key` unless both are there, name all of `identity` and are valid for
    /// another [`RENEW_DAYS`] days.
    ///
    /// # Errors
    /// As [`Authority::issue`], and when the files cannot be written.
    pub fn ensure(&self, dir: &Path, name: &str, identity: &Identity) -> Result<(), Error> {
        let (cert_path, key_path) =
            (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        if key_path.exists()
            && let Ok(pem) = fs::read_to_string(&cert_path)
            && crate::certificate::Certificate::parse(&pem)
                .is_ok_and(|found| found.serves(identity, RENEW_DAYS))
        {
            return Ok(());
        }
        self.reissue(dir, name, identity)
    }

    /// Issues into `<dir>/<name>.crt` and `<name>.key`, whatever is there.
    ///
    /// # Errors
    /// As [`Authority::issue`], and when the files cannot be written.
    pub fn reissue(&self, dir: &Path, name: &str, identity: &Identity) -> Result<(), Error> {
        let (cert_path, key_path) =
            (dir.join(format!("{name}.crt")), dir.join(format!("{name}.key")));
        let (certificate, key) = self.issue(identity)?;
        write_private(&key_path, &key)?;
        write_public(&cert_path, &certificate)
    }
}

/// The public half of a private key in PEM, as PEM.
///
/// # Errors
/// The text is no key.
pub fn public_key_pem(key_pem: &str) -> Result<String, Error> {
    KeyPair::from_pem(key_pem)
        .map(|key| key.public_key_pem())
        .map_err(|source| Error::Make { subject: "the public key".to_owned(), source })
}

pub(crate) fn subject_alt_names(addresses: &[IpAddr]) -> impl Iterator<Item = SanType> {
    addresses.iter().copied().map(SanType::IpAddress)
}

fn set_validity(params: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + Duration::days(days);
}

pub(crate) fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

pub(crate) fn write_public(path: &Path, text: &str) -> Result<(), Error> {
    write_mode(path, text, 0o644)
}

pub(crate) fn write_private(path: &Path, text: &str) -> Result<(), Error> {
    write_mode(path, text, 0o600)
}

/// Writes beside the target and renames, so that a reader never sees half a key.
fn write_mode(path: &Path, text: &str, mode: u32) -> Result<(), Error> {
    let fail = |source| Error::Write { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)
        .map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    fs::rename(&temporary, path).map_err(fail)
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::*;

    use super::*;

    #[test]
    fn a_leaf_names_user_and_group_and_is_signed_by_the_authority() {
        let authority = Authority::create("orch-ca").expect("authority");
        let (pem, _) = authority
            .issue(&Identity::client("system:node:node-1", Some("system:nodes")))
            .expect("leaf");
        let (_, block) = parse_x509_pem(pem.as_bytes()).expect("PEM");
        let leaf = block.parse_x509().expect("X.509");
        assert_eq!(leaf.subject().to_string(), "O=system:nodes, CN=system:node:node-1");

        let (_, block) = parse_x509_pem(authority.certificate_pem().as_bytes()).expect("PEM");
        let root = block.parse_x509().expect("X.509");
        assert_eq!(leaf.issuer(), root.subject());
    }

    #[test]
    fn an_authority_read_back_signs_with_the_same_name() {
        let dir = std::env::temp_dir().join(format!("orch-pki-{}", std::process::id()));
        let first = Authority::load_or_create(&dir, "ca", "orch-ca").expect("made");
        let second = Authority::load_or_create(&dir, "ca", "orch-ca").expect("read");
        assert_eq!(first.certificate_pem(), second.certificate_pem());
        second.issue(&Identity::client("admin", Some("system:masters"))).expect("issue");
        std::fs::write(dir.join("ca.key"), "rubbish").expect("write");
        let error = Authority::load_or_create(&dir, "ca", "orch-ca")
            .err()
            .expect("a broken key is refused");
        assert!(error.to_string().contains("remove it together with its pair"), "{error}");
        std::fs::remove_dir_all(dir).expect("clean up");
    }
}
