//! orch-controllers
