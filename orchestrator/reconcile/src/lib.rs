//! What every control loop is made of: caches of the API server's objects, work queues, the loop itself, events, and
//! the Lease that picks one leader.
//!
//! Start at [`Informers`]: one list and watch per kind, shared by all who ask. An [`Informer`] tells changes to a
//! [`Queue`]; [`run`] takes keys from it and calls a [`Reconciler`]. [`EventRecorder`] tells the user what was done.

mod backoff;
mod controller;
mod events;
mod informer;
mod leader;
mod queue;

pub use backoff::Backoff;
pub use controller::{Action, Reconciler, Transient, run};
pub use events::EventRecorder;
pub use informer::{Change, Informer, Informers};
pub use leader::{Election, lead};
pub use queue::Queue;
