//! A client that writes all the time and remembers what was acknowledged.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use http::Method;
use orch_client::Client;
use serde_json::{Value, json};
use tests_e2e::testlab::TestLab;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
/// A write that takes longer has failed; whether it happened is not known then.
const LIMIT: Duration = Duration::from_secs(3);
/// Between two writes.
const PAUSE: Duration = Duration::from_millis(20);

/// What the writer saw.
#[derive(Debug, Clone)]
pub(crate) struct Written {
    pub(crate) acknowledged: Vec<String>,
    pub(crate) failed: usize,
    /// The longest time between two acknowledgements.
    pub(crate) longest_gap: Duration,
    last: Instant,
}

impl Written {
    /// # Errors
    /// A write that was acknowledged is not there.
    pub(crate) fn all_are_there(&self, lab: &TestLab) -> anyhow::Result<()> {
        let list = lab.json(&["configmaps", "-l", "test=ha"])?;
        let names: BTreeSet<&str> = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|item| item["metadata"]["name"].as_str())
            .collect();
        let lost: Vec<&String> =
            self.acknowledged.iter().filter(|name| !names.contains(name.as_str())).collect();
        ensure!(lost.is_empty(), "{} acknowledged writes are lost: {lost:?}", lost.len());
        ensure!(self.acknowledged.len() > 50, "only {} writes", self.acknowledged.len());
        Ok(())
    }
}

/// A writer under way.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Written>>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Writer {
    /// Starts to write as whom `kubeconfig` names.
    ///
    /// # Errors
    /// The kubeconfig cannot be used.
    pub(crate) fn start(kubeconfig: PathBuf) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Written {
            acknowledged: Vec::new(),
            failed: 0,
            longest_gap: Duration::ZERO,
            last: Instant::now(),
        }));
        let (told, note) = (stop.clone(), seen.clone());
        let thread = std::thread::spawn(move || drive(&kubeconfig, &told, &note));
        Ok(Self { stop, seen, thread })
    }

    fn seen(&self) -> Written {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until something more is acknowledged than was begun before this call; returns how long that took.
    ///
    /// # Errors
    /// It takes longer than `limit`.
    pub(crate) fn written(&self, limit: Duration) -> anyhow::Result<Duration> {
        // Two: the first one may have been under way.
        let (begun, before) = (Instant::now(), self.seen().acknowledged.len());
        while self.seen().acknowledged.len() < before + 2 {
            ensure!(begun.elapsed() < limit, "nothing was acknowledged for {limit:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(begun.elapsed())
    }

    /// Ends the writer.
    ///
    /// # Errors
    /// It broke off.
    pub(crate) fn stop(self) -> anyhow::Result<Written> {
        self.stop.store(true, Ordering::Relaxed);
        let seen = self.seen.clone();
        self.thread.join().map_err(|_| anyhow!("the writer panicked"))??;
        let written = seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(written)
    }
}

fn drive(kubeconfig: &Path, stop: &AtomicBool, seen: &Mutex<Written>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(async {
        let client = Client::from_kubeconfig(kubeconfig)?;
        let run = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        for number in 0_u64.. {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            let name = format!("ha-{run}-{number}");
            let map =
                json!({ "metadata": { "name": name, "labels": { "test": "ha" } }, "data": { "a": "b" } });
            let write =
                client.json::<Value>(Method::POST, MAPS, "application/json", Some(&map));
            let acknowledged = matches!(tokio::time::timeout(LIMIT, write).await, Ok(Ok(_)));
            {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                if acknowledged {
                    seen.longest_gap = seen.longest_gap.max(seen.last.elapsed());
                    seen.last = Instant::now();
                    seen.acknowledged.push(name);
                } else {
                    seen.failed += 1;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    })
}
