//! Certificate signing requests (PKCS#10, RFC 2986): made by who wants a certificate, read and signed by who has an
//! authority. The key never leaves its host.

use std::net::IpAddr;

use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, KeyPair,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;

use crate::authority::{Authority, Error, Identity, subject_alt_names};

/// A request and the key that it is for, both PEM.
pub struct Request {
    pub request_pem: String,
    pub key_pem: String,
}

impl Request {
    /// A new key, and a request for `identity`. What the certificate may be used for is the signer's to say.
    ///
    /// # Errors
    /// A name does not fit into a certificate.
    pub fn new(identity: &Identity) -> Result<Self, Error> {
        let make = || -> Result<Self, rcgen::Error> {
            let mut params = CertificateParams::new(identity.dns_names.clone())?;
            params.subject_alt_names.extend(subject_alt_names(&identity.addresses));
            params.distinguished_name = DistinguishedName::new();
            if let Some(group) = &identity.group {
                params.distinguished_name.push(DnType::OrganizationName, group.as_str());
            }
            params.distinguished_name.push(DnType::CommonName, identity.user.as_str());
            let key = KeyPair::generate()?;
            let request = params.serialize_request(&key)?;
            Ok(Self { request_pem: request.pem()?, key_pem: key.serialize_pem() })
        };
        make().map_err(|source| Error::Make { subject: identity.user.clone(), source })
    }
}

/// What a request asks for, as it stands there: nothing of it is granted yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Asked {
    pub user: String,
    pub groups: Vec<String>,
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
    /// It names something else besides: a URI, a mail address, an extension or a part of the subject.
    pub has_more: bool,
}

/// Reads a request and checks that it was signed by its own key.
///
/// # Errors
/// It is no request, or the signature is wrong.
pub fn read_request(pem: &str) -> Result<Asked, Error> {
    let broken =
        |source| Error::Make { subject: "the certificate signing request".to_owned(), source };
    // Checks the signature, and refuses extensions that it does not know.
    CertificateSigningRequestParams::from_pem(pem).map_err(broken)?;
    let unreadable = || broken(rcgen::Error::CouldNotParseCertificationRequest);
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).map_err(|_| unreadable())?;
    let (_, request) =
        X509CertificationRequest::from_der(&block.contents).map_err(|_| unreadable())?;
    let mut asked = Asked::default();
    let mut names = 0;
    for attribute in request.certification_request_info.subject.iter_attributes() {
        let text = attribute.as_str().map_err(|_| unreadable())?.to_owned();
        let kind = attribute.attr_type();
        if *kind == x509_parser::oid_registry::OID_X509_COMMON_NAME {
            names += 1;
            asked.user = text;
        } else if *kind == x509_parser::oid_registry::OID_X509_ORGANIZATION_NAME {
            asked.groups.push(text);
        } else {
            asked.has_more = true;
        }
    }
    asked.has_more |= names != 1;
    for extension in request.requested_extensions().into_iter().flatten() {
        match extension {
            ParsedExtension::SubjectAlternativeName(list) => {
                for name in &list.general_names {
                    match name {
                        GeneralName::DNSName(name) => asked.dns_names.push((*name).to_owned()),
                        GeneralName::IPAddress(bytes) => match address(bytes) {
                            Some(address) => asked.addresses.push(address),
                            None => asked.has_more = true,
                        },
                        _ => asked.has_more = true,
                    }
                }
            }
            // The signer decides about these, whatever is asked for.
            ParsedExtension::KeyUsage(_) | ParsedExtension::ExtendedKeyUsage(_) => {}
            _ => asked.has_more = true,
        }
    }
    Ok(asked)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}

impl Authority {
    /// A certificate for the key of a request, naming `identity` and nothing that only the request says. PEM.
    ///
    /// # Errors
    /// It is no request, or a name does not fit into a certificate.
    pub fn sign(&self, request_pem: &str, identity: &Identity) -> Result<String, Error> {
        let make = || -> Result<String, rcgen::Error> {
            let request = CertificateSigningRequestParams::from_pem(request_pem)?;
            self.certify(identity, &request.public_key)
        };
        make().map_err(|source| Error::Make { subject: identity.user.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Usage;

    fn node() -> Identity {
        Identity {
            user: "system:node:a".to_owned(),
            group: Some("system:nodes".to_owned()),
            dns_names: vec!["a".to_owned()],
            addresses: vec!["10.0.0.1".parse().expect("an address")],
            usage: Usage::Server,
        }
    }

    #[test]
    fn a_request_says_what_it_was_made_of_and_the_certificate_fits_its_key() {
        let request = Request::new(&node()).expect("a request");
        let asked = read_request(&request.request_pem).expect("readable");
        assert_eq!(asked.user, "system:node:a");
        assert_eq!(asked.groups, ["system:nodes"]);
        assert_eq!(asked.dns_names, ["a"]);
        assert_eq!(asked.addresses, node().addresses);
        assert!(!asked.has_more);

        let authority = Authority::create("ca").expect("authority");
        let pem = authority.sign(&request.request_pem, &node()).expect("signed");
        let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).expect("PEM");
        let leaf = block.parse_x509().expect("X.509");
        let key = KeyPair::from_pem(&request.key_pem).expect("a key");
        assert_eq!(&*leaf.public_key().subject_public_key.data, key.public_key_raw());
        assert_eq!(leaf.subject().to_string(), "O=system:nodes, CN=system:node:a");
    }

    #[test]
    fn rubbish_and_changed_requests_are_refused() {
        assert!(read_request("rubbish").is_err());
        let request = Request::new(&node()).expect("a request").request_pem;
        // One character of the signed part.
        let lines: Vec<&str> = request.lines().collect();
        let at = lines[1].len() - 3;
        let swapped = if lines[1].as_bytes()[at] == b'A' { "B" } else { "A" };
        let changed = request.replacen(
            lines[1],
            &format!("{}{swapped}{}", &lines[1][..at], &lines[1][at + 1..]),
            1,
        );
        assert!(read_request(&changed).is_err());
    }
}
