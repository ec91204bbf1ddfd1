//! A plugin's `main`: environment and stdin in, exactly one JSON document out.
//!
//! A plugin implements [`Plugin`] and its executable says [`main`]. What comes in has been checked before a
//! handler sees it: variables, names, versions, `prevResult`. What goes out is one document in the version of
//! the configuration, for errors and panics too; everything said to people goes to stderr.
//!
//! [`call()`] is the same without a process around it: tests use it, and a plugin that delegates to another one
//! of the same executable.
//!
//! Source: CNI specification 1.1.0 §2; what the reference's `pkg/skel` adds to it.

mod call;
mod file;
mod process;
mod request;

pub use call::call;
pub use file::{read_small, read_small_file};
pub use process::main;
pub use request::{AddRequest, CheckRequest, DelRequest, GcRequest, Request, StatusRequest};

use cni_spec::{AddResult, Error};
use serde::de::DeserializeOwned;

/// A plugin: one handler per verb. VERSION is answered without it.
pub trait Plugin {
    /// Its configuration. Decoded from the whole request configuration; unknown keys are to be ignored.
    type Conf: DeserializeOwned;

    /// Name of the executable, which is also `type` in configurations.
    fn name(&self) -> &'static str;

    /// One sentence for a person who starts it by hand.
    fn about(&self) -> &'static str;

    /// ADD: attach the container, or leave nothing behind.
    ///
    /// # Errors
    /// Why the container is not attached.
    fn add(&self, req: AddRequest<Self::Conf>) -> Result<AddResult, Error>;

    /// DEL: detach it. Succeeds when called again and when things are gone already.
    ///
    /// # Errors
    /// What could not be removed.
    fn del(&self, req: DelRequest<Self::Conf>) -> Result<(), Error>;

    /// CHECK: compare with the result of ADD.
    ///
    /// # Errors
    /// What differs.
    fn check(&self, req: CheckRequest<Self::Conf>) -> Result<(), Error>;

    /// GC: remove what belongs to no valid attachment; goes on past failures.
    ///
    /// # Errors
    /// All failures together.
    fn gc(&self, req: GcRequest<Self::Conf>) -> Result<(), Error>;

    /// STATUS: whether an ADD could be served now.
    ///
    /// # Errors
    /// Code 50 or 51 with the reason.
    fn status(&self, req: StatusRequest<Self::Conf>) -> Result<(), Error>;
}
