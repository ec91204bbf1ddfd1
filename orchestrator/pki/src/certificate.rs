//! Reading certificates: whom they name, until when, and their fingerprint.

use std::net::IpAddr;

use sha2::{Digest as _, Sha256};
use time::{Duration, OffsetDateTime};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::Identity;

/// The text is no certificate.
#[derive(Debug, thiserror::Error)]
#[error("this is no certificate in PEM")]
pub struct Unreadable;

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Common name.
    pub user: String,
    /// Organisations.
    pub groups: Vec<String>,
    /// Common name of who signed it.
    pub issuer: String,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    pub is_authority: bool,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
    public_key: Vec<u8>,
}

impl Certificate {
    /// Reads the first certificate of a PEM text.
    ///
    /// # Errors
    /// There is none.
    pub fn parse(pem: &str) -> Result<Self, Unreadable> {
        let (_, block) =
            x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| Unreadable)?;
        let (_, found) = X509Certificate::from_der(&block.contents).map_err(|_| Unreadable)?;
        let common_name = |name: &x509_parser::x509::X509Name<'_>| {
            name.iter_common_name()
                .next()
                .and_then(|part| part.as_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        let (mut dns_names, mut addresses) = (Vec::new(), Vec::new());
        if let Ok(Some(names)) = found.subject_alternative_name() {
            for name in &names.value.general_names {
                match name {
                    GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
                    GeneralName::IPAddress(bytes) => addresses.extend(
                        <[u8; 4]>::try_from(*bytes)
                            .map(IpAddr::from)
                            .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from))
                            .ok(),
                    ),
                    _ => {}
                }
            }
        }
        Ok(Self {
            user: common_name(found.subject()),
            groups: found
                .subject()
                .iter_organization()
                .filter_map(|part| part.as_str().ok().map(str::to_owned))
                .collect(),
            issuer: common_name(found.issuer()),
            dns_names,
            addresses,
            is_authority: found.is_ca(),
            not_before: found.validity().not_before.to_datetime(),
            not_after: found.validity().not_after.to_datetime(),
            public_key: found.public_key().raw.to_vec(),
        })
    }

    /// `sha256:<hex>` of the public key (SubjectPublicKeyInfo), as kubeadm pins authorities: it survives a renewed
    /// certificate with the same key.
    #[must_use]
    pub fn pin(&self) -> String {
        let hex: String =
            Sha256::digest(&self.public_key).iter().map(|byte| format!("{byte:02x}")).collect();
        format!("sha256:{hex}")
    }

    /// Whole days until it ends; negative when it has.
    #[must_use]
    pub fn days_left(&self) -> i64 {
        (self.not_after - OffsetDateTime::now_utc()).whole_days()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.not_after < OffsetDateTime::now_utc()
    }

    /// Whether it names all of `identity`, is in no group besides, and is valid for another `days` days.
    pub(crate) fn serves(&self, identity: &Identity, days: i64) -> bool {
        self.user == identity.user
            && self.groups.iter().eq(identity.group.iter())
            && identity.dns_names.iter().all(|name| self.dns_names.contains(name))
            && identity.addresses.iter().all(|address| self.addresses.contains(address))
            && self.not_after > OffsetDateTime::now_utc() + Duration::days(days)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Authority, Usage};

    #[test]
    fn a_certificate_is_read_and_its_pin_is_of_the_key() {
        let authority = Authority::create("orch-ca").expect("authority");
        let root = Certificate::parse(authority.certificate_pem()).expect("readable");
        assert!(root.is_authority && root.user == "orch-ca");
        assert!(root.pin().starts_with("sha256:") && root.pin().len() == 7 + 64);

        let mut identity = Identity {
            user: "etcd-server".to_owned(),
            group: None,
            dns_names: vec!["localhost".to_owned()],
            addresses: vec!["10.0.0.1".parse().expect("an address")],
            usage: Usage::Both,
        };
        let (pem, _) = authority.issue(&identity).expect("issued");
        let leaf = Certificate::parse(&pem).expect("readable");
        assert_eq!((leaf.issuer.as_str(), leaf.days_left()), ("orch-ca", 364));
        assert!(leaf.serves(&identity, 60) && !leaf.serves(&identity, 400));
        let masters = Identity { group: Some("system:masters".to_owned()), ..identity.clone() };
        let (pem, _) = authority.issue(&masters).expect("issued");
        let of_masters = Certificate::parse(&pem).expect("readable");
        assert!(
            of_masters.serves(&masters, 60) && !of_masters.serves(&identity, 60),
            "it may less"
        );
        assert!(!leaf.serves(&masters, 60));
        identity.addresses.push("10.0.0.2".parse().expect("an address"));
        assert!(!leaf.serves(&identity, 60), "a new address asks for a new certificate");
        assert!(Certificate::parse("rubbish").is_err());
    }
}
