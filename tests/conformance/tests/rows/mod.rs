//! The tables.

mod bad_input;
mod bridge;
mod faults;
mod host_local;
mod spec;
mod static_ipam;
mod upkeep;

use tests_conformance::{Bed, Result};

/// What is asked, and how.
pub(crate) type Row = (&'static str, fn(&Bed) -> Result);

/// Rows by the names of their functions.
macro_rules! rows {
    ($($name:ident),* $(,)?) => {
        &[$((stringify!($name), $name as fn(&tests_conformance::Bed) -> tests_conformance::Result)),*]
    };
}
use rows;

/// All rows, by table.
pub(crate) const TABLES: &[(&str, &[Row])] = &[
    ("spec", spec::ROWS),
    ("spec", upkeep::ROWS),
    ("bridge", bridge::ROWS),
    ("host_local", host_local::ROWS),
    ("static", static_ipam::ROWS),
    ("bad_input", bad_input::ROWS),
    ("faults", faults::ROWS),
];
