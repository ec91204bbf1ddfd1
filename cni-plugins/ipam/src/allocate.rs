//! From range sets and leases to addresses.

use std::net::IpAddr;

use cni_spec::{AttachmentId, Error, code};
use ipnetwork::IpNetwork;

use crate::range::{Range, RangeSet};
use crate::store::{Store, StoreError};

/// Addresses tried one by one before the folder is listed. Addresses are given in turn, so mostly the first one
/// is free; a listing costs as much as some hundred tries.
const TRIES: usize = 32;

/// Why there is no address; the CNI error's code and message come from it.
#[derive(Debug, thiserror::Error)]
pub enum AllocError {
    /// All addresses are leased.
    #[error("range set {index} ({ranges}) is full: {leased} of {capacity} addresses are leased")]
    Full {
        /// Which set.
        index: usize,
        /// Its ranges.
        ranges: String,
        /// Addresses of the set with a lease.
        leased: u128,
        /// Addresses the set can give.
        capacity: u128,
    },
    /// The attachment has an address already.
    #[error("{ip} is leased to {id} already, and a second ADD gets no second address")]
    Duplicate {
        /// The address.
        ip: IpAddr,
        /// The attachment.
        id: AttachmentId,
    },
    /// A requested address is somebody else's.
    #[error("the requested address {ip} is leased to {owner}")]
    Taken {
        /// The address.
        ip: IpAddr,
        /// Who has it.
        owner: String,
    },
    /// A requested address is the subnet's gateway.
    #[error("the requested address {ip} is the gateway of its subnet")]
    Gateway {
        /// The address.
        ip: IpAddr,
    },
    /// Requested addresses that cannot be given.
    #[error("the requested addresses {} are in no range set, or their set gives another one", list(.ips))]
    Unusable {
        /// The addresses.
        ips: Vec<IpAddr>,
    },
    /// The files.
    #[error("lease files")]
    Store(#[from] StoreError),
}

fn list(ips: &[IpAddr]) -> String {
    ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl From<AllocError> for Error {
    fn from(error: AllocError) -> Self {
        let code = match &error {
            AllocError::Full { .. } | AllocError::Taken { .. } => code::NO_FREE_ADDRESS,
            AllocError::Duplicate { .. } => code::ALREADY_ATTACHED,
            AllocError::Gateway { .. } | AllocError::Unusable { .. } => code::INVALID_CONFIG,
            AllocError::Store(_) => code::IO,
        };
        let hint = match &error {
            AllocError::Full { .. } => {
                Some("containers that ended without DEL keep their lease until GC")
            }
            AllocError::Duplicate { .. } => Some("DEL frees it"),
            _ => None,
        };
        let error = Self::from_chain(code, &error);
        match hint {
            Some(hint) => error.with_details(hint),
            None => error,
        }
    }
}

/// Leases one address of each set, or none: address with prefix, and gateway.
pub(crate) fn lease_all(
    store: &Store,
    sets: &[RangeSet],
    requested: &[IpAddr],
    id: &AttachmentId,
) -> Result<Vec<(IpNetwork, IpAddr)>, AllocError> {
    let ours = |ip: &IpAddr| sets.iter().any(|set| set.range_of(*ip).is_some());
    if let Some(ip) = store.leases_of(id)?.into_iter().find(ours) {
        return Err(AllocError::Duplicate { ip, id: id.clone() });
    }
    let mut left = requested.to_vec();
    let mut leased = Vec::new();
    let mut failure = None;
    for (index, set) in sets.iter().enumerate() {
        let wanted =
            left.iter().position(|ip| set.range_of(*ip).is_some()).map(|at| left.remove(at));
        let lease = match wanted {
            Some(ip) => lease_requested(store, index, set, ip, id),
            None => lease_next(store, index, set, id),
        };
        match lease {
            Ok((ip, range)) => leased.push((range.with_prefix(ip), range.gateway())),
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    if failure.is_none() && !left.is_empty() {
        failure = Some(AllocError::Unusable { ips: left });
    }
    let Some(failure) = failure else { return Ok(leased) };
    for (address, _) in leased {
        if let Err(error) = store.release(address.ip()) {
            eprintln!("host-local: give {} back: {error}: {}", address.ip(), error.source);
        }
    }
    Err(failure)
}

fn lease_requested<'a>(
    store: &Store,
    index: usize,
    set: &'a RangeSet,
    ip: IpAddr,
    id: &AttachmentId,
) -> Result<(IpAddr, &'a Range), AllocError> {
    let Some(range) = set.range_of(ip) else { return Err(AllocError::Unusable { ips: vec![ip] }) };
    if ip == range.gateway() {
        return Err(AllocError::Gateway { ip });
    }
    if store.draft(id)?.claim(index, ip)? {
        return Ok((ip, range));
    }
    let owner = match store.owner(ip)? {
        Some(crate::Owner::Attachment(container, ifname)) => format!("{container}/{ifname}"),
        Some(crate::Owner::Container(container)) => container,
        Some(crate::Owner::Nobody) | None => "an unknown container".to_owned(),
    };
    Err(AllocError::Taken { ip, owner })
}

fn lease_next<'a>(
    store: &Store,
    index: usize,
    set: &'a RangeSet,
    id: &AttachmentId,
) -> Result<(IpAddr, &'a Range), AllocError> {
    let draft = store.draft(id)?;
    let last = store.last_reserved(index);
    for (ip, range) in set.candidates(last).take(TRIES) {
        if draft.claim(index, ip)? {
            return Ok((ip, range));
        }
    }
    // A long run of leases lies ahead: one listing finds its end, or that there is none.
    loop {
        let (ip, range) = match next_free(store, index, set) {
            Err(AllocError::Full { .. }) if store.release_nobodys()? > 0 => continue,
            other => other?,
        };
        if draft.claim(index, ip)? {
            return Ok((ip, range));
        }
    }
}

/// The next address that would be leased from a set.
pub(crate) fn find_free(store: &Store, index: usize, set: &RangeSet) -> Result<(), AllocError> {
    for (ip, _) in set.candidates(store.last_reserved(index)).take(TRIES) {
        if !store.is_taken(ip)? {
            return Ok(());
        }
    }
    next_free(store, index, set).map(drop)
}

fn next_free<'a>(
    store: &Store,
    index: usize,
    set: &'a RangeSet,
) -> Result<(IpAddr, &'a Range), AllocError> {
    let taken = store.taken()?;
    let free = set.candidates(store.last_reserved(index)).find(|(ip, _)| !taken.contains(ip));
    free.ok_or_else(|| AllocError::Full {
        index,
        ranges: set.to_string(),
        leased: set.capacity(),
        capacity: set.capacity(),
    })
}
