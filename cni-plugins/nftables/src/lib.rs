//! A table of nftables as plain data, and the one transaction that makes the kernel hold exactly that.
//!
//! [`Table`] is the whole of what somebody owns: chains, sets, maps. [`Table::replace_script`] writes it from
//! nothing, [`Table::update_script`] the difference to what was applied before: untouched chains keep their
//! rules and counters, dynamic sets their elements. [`Nft`] hands a script to the `nft` tool, which sends it to
//! the kernel as one transaction: either all of it is in force or nothing has changed.
//!
//! Text instead of the tool's JSON: nft 1.1.4 changed the JSON of port matches and broke its users
//! (netavark #1303), while the language itself is what distributions test.
//!
//! Who only adds and deletes elements, once per pod, does so without a process: [`Netfilter`]. [`forget_flows`] makes
//! conntrack forget what it has decided by rules that are no more; [`Usage`] says how full it is.

mod conntrack;
mod netfilter;
mod script;
mod table;
mod tool;
mod wire;

pub use conntrack::{Flow, Flows, Usage, bear_gaps, forget_flows, forget_flows_that};
pub use netfilter::{
    COMMENT_MAX, Element, Netfilter, NetfilterError, Rule, Target, Transaction, undisturbed,
};
pub use table::{Base, Chain, Family, Hook, Set, SetKind, Table};
pub use tool::{Nft, NftError};
