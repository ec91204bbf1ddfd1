use std::path::PathBuf;

/// Why something could not be done with programs or maps.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder of the pins.
    #[error("{what} {}", path.display())]
    File {
        /// What was to be done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The kernel refused the object.
    #[error("load the eBPF object")]
    Load(#[source] Box<aya::EbpfError>),
    /// The kernel refused a program.
    #[error("{what} program {name}")]
    Program {
        /// What was to be done.
        what: &'static str,
        /// With which program.
        name: String,
        /// The kernel's reason.
        source: Box<aya::programs::ProgramError>,
    },
    /// A program or map is not in the object.
    #[error("the eBPF object has no {0}")]
    Missing(String),
    /// A map that does not do what it should.
    #[error("{what} map {name}")]
    Map {
        /// What was to be done.
        what: &'static str,
        /// With which map.
        name: &'static str,
        /// The kernel's reason.
        source: Box<aya::maps::MapError>,
    },
    /// More than a map may hold.
    #[error("{count} {what} are more than the {most} that a map may hold")]
    TooBig {
        /// Of what.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many may be.
        most: u32,
    },
    /// A pinned map of another layout.
    #[error("pinned map {name} is {have}, these programs need {want}; remove {} and start again", path.display())]
    Layout {
        /// Its name.
        name: String,
        /// What is pinned.
        have: String,
        /// What is needed.
        want: String,
        /// Where it is.
        path: PathBuf,
    },
    /// Pinning.
    #[error("pin {}", path.display())]
    Pin {
        /// Where to.
        path: PathBuf,
        /// The kernel's reason.
        source: Box<aya::pin::PinError>,
    },
    /// A pinned link.
    #[error("use link {}", path.display())]
    Link {
        /// Its pin.
        path: PathBuf,
        /// The kernel's reason.
        source: Box<aya::programs::links::LinkError>,
    },
}

impl Error {
    pub(crate) fn program(
        what: &'static str,
        name: &str,
    ) -> impl FnOnce(aya::programs::ProgramError) -> Self {
        let name = name.to_owned();
        move |source| Self::Program { what, name, source: Box::new(source) }
    }

    pub(crate) fn map(
        what: &'static str,
        name: &'static str,
    ) -> impl FnOnce(aya::maps::MapError) -> Self {
        move |source| Self::Map { what, name, source: Box::new(source) }
    }

    pub(crate) fn link(
        path: &std::path::Path,
    ) -> impl FnOnce(aya::programs::links::LinkError) -> Self {
        let path = path.to_owned();
        move |source| Self::Link { path, source: Box::new(source) }
    }
}
