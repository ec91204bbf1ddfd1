//! What a long command is doing, on stderr: a spinner on a terminal, one line a step elsewhere.

use std::future::Future;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a step that is not shown as a spinner says what it waits for.
const REMIND: Duration = Duration::from_secs(10);

/// One step under way.
pub(crate) struct Step {
    label: String,
    started: Instant,
    bar: Option<ProgressBar>,
    reminded: Instant,
}

impl Step {
    pub(crate) fn new(label: impl Into<String>) -> Self {
        let label = label.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_style(
                ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.set_message(label.clone());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let now = Instant::now();
        Self { label, started: now, bar, reminded: now }
    }

    /// Says what is waited for.
    pub(crate) fn waiting(&mut self, what: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{}: waiting for {what}", self.label)),
            None if self.reminded.elapsed() > REMIND => {
                self.reminded = Instant::now();
                eprintln!(
                    "    {}: still waiting for {what} ({:.0?})",
                    self.label,
                    self.started.elapsed()
                );
            }
            None => {}
        }
    }

    pub(crate) fn done(self, result: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let result = if result.is_empty() { String::new() } else { format!(": {result}") };
        eprintln!("  ✓ {}{result} ({seconds:.1} s)", self.label);
    }

    pub(crate) fn failed(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("  ✗ {} ({:.1} s)", self.label, self.started.elapsed().as_secs_f64());
    }
}

/// Runs one step; its result is the text behind the label.
pub(crate) async fn step<F>(label: &str, work: F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<String>>,
{
    let step = Step::new(label);
    match work.await {
        Ok(result) => {
            step.done(&result);
            Ok(())
        }
        Err(error) => {
            step.failed();
            Err(error)
        }
    }
}

/// Polls `check` until it is `Ok(Ok(result))`; `Ok(Err(what))` says what is still waited for.
pub(crate) async fn wait<F, Fut>(label: &str, limit: Duration, mut check: F) -> anyhow::Result<()>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = anyhow::Result<Result<String, String>>>,
{
    let mut step = Step::new(label);
    let deadline = Instant::now() + limit;
    loop {
        match check().await {
            Ok(Ok(result)) => {
                step.done(&result);
                return Ok(());
            }
            Ok(Err(what)) if Instant::now() < deadline => step.waiting(&what),
            Ok(Err(what)) => {
                step.failed();
                anyhow::bail!(
                    "{label}: gave up after {} s, still waiting for {what}",
                    limit.as_secs()
                );
            }
            Err(error) => {
                step.failed();
                return Err(error);
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
