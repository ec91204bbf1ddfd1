//! Whose something in the kernel is, as text for a comment beside it.

use std::fmt;

use crate::{AttachmentId, NetworkName, stable_hash};

/// Network, container and interface. What is too long for its place is hashed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner(String);

impl Owner {
    /// The owner's text, in at most `room` bytes; 34 are the fewest that are enough for every attachment.
    #[must_use]
    pub fn new(network: &NetworkName, id: &AttachmentId, room: usize) -> Self {
        let text = format!("{network}/{id}");
        if text.len() <= room {
            return Self(text);
        }
        Self(format!("#{:016x}/{:016x}", stable_hash(&[network.as_str()]), stable_hash(&[&text])))
    }

    /// The owner that a comment names.
    #[must_use]
    pub fn of_comment(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// Whether it is of this network.
    #[must_use]
    pub fn is_of(&self, network: &NetworkName) -> bool {
        let begins =
            |prefix: &str| self.0.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'));
        begins(network.as_str()) || begins(&format!("#{:016x}", stable_hash(&[network.as_str()])))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_fits_and_is_of_its_network_alone() {
        let id = |container: &str| AttachmentId {
            container_id: container.parse().expect("good"),
            ifname: "eth0".parse().expect("good"),
        };
        let (net, longer): (NetworkName, NetworkName) =
            ("net".parse().expect("good"), "net2".parse().expect("good"));
        for container in ["c1".to_owned(), "c".repeat(200)] {
            let owner = Owner::new(&net, &id(&container), 60);
            assert!(owner.to_string().len() <= 60, "{owner}");
            assert!(owner.is_of(&net) && !owner.is_of(&longer));
            assert_ne!(owner, Owner::new(&longer, &id(&container), 60));
            assert_eq!(owner, Owner::of_comment(&owner.to_string()));
        }
    }
}
