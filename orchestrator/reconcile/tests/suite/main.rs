//! Informers and leaders against the API server in memory, in one program.

mod informer;
mod leader;
