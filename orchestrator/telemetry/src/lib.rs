//! orch-telemetry
