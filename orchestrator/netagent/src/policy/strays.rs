//! Packets from the middle of TCP connections that the programs do not know: forgotten ones, when more flows were there than
//! their map takes. The programs drop what not both sides may open, and note whose packet it was; here the pod's sockets
//! are asked, and what is sent again is judged as the connection that it belongs to. Without an agent they stay closed.
//!
//! Beside it, room is made in the ring of events, which nobody reads as a rule.

use std::time::Duration;

use cni_netlink::NetNs;
use orch_config::Paths;
use orch_ebpf_loader::{Events, Kept, Maps, Pins};
use orch_ebpf_maps::Loss;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{adopt, connections, state_dir};
use crate::chain;

/// TCP sends again after 200 ms at the earliest, and each time later. A pod that makes such packets on purpose has its
/// sockets read this often and no more.
const INTERVAL: Duration = Duration::from_millis(250);

/// Asks until cancelled.
pub(super) async fn follow(paths: Paths, cancel: CancellationToken) {
    let mut tick = interval(INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut maps: Option<Maps> = None;
    let mut lost = None;
    let mut complained = None;
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = tick.tick() => {}
        }
        let (paths, opened) = (paths.clone(), maps.take());
        let work = move || {
            let pins = Pins::below(paths.root());
            // Until the programs are there.
            if opened.is_none() && !pins.are_there() {
                return Ok(None);
            }
            let opened = opened.map_or_else(|| Maps::open(&pins), Ok);
            let mut maps = opened.map_err(|error| chain(&error))?;
            ask(&mut maps, &paths)?;
            let lost = make_room(&maps, &pins, lost).map_err(|error| chain(&error))?;
            Ok(Some((maps, lost)))
        };
        let outcome = tokio::task::spawn_blocking(work).await;
        match outcome.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(opened) => {
                if let Some((opened, now)) = opened {
                    (maps, lost) = (Some(opened), Some(now));
                }
                complained = None;
            }
            Err(why) => {
                if complained.as_ref() != Some(&why) {
                    warn!(why, "connections that the programs have forgotten stay cut");
                    complained = Some(why);
                }
            }
        }
    }
}

/// Forgets the oldest events if the ring was full since the last time, so that `orchctl net flows` shows the newest. Returns
/// how many found it full so far; `before` is what that was then.
fn make_room(
    maps: &Maps,
    pins: &Pins,
    before: Option<u64>,
) -> Result<u64, orch_ebpf_loader::Error> {
    let losses = maps.event_losses()?;
    let full = losses.into_iter().find(|(loss, _)| *loss == Loss::RingFull);
    let lost = full.map_or(0, |(_, events)| events);
    // Somebody who has a turn reads it empty.
    if before.is_some_and(|before| lost > before)
        && let Some(turn) = Events::open(pins)?
    {
        turn.forget_oldest_half();
    }
    Ok(lost)
}

/// Tells the programs of what is open in pods that they have noted.
///
/// # Errors
/// If the kernel or the runtime's cache cannot be asked.
pub fn ask(maps: &mut Maps, paths: &Paths) -> Result<(), String> {
    let uids = maps.take_strays().map_err(|error| chain(&error))?;
    if uids.is_empty() {
        return Ok(());
    }
    let cached = adopt::cni(paths).cached().map_err(|error| error.to_string())?;
    for one in cached {
        let kept = Kept::of(&state_dir(paths), one.network.as_ref());
        let made = kept.read(one.id.container_id.as_ref(), one.id.ifname.as_str());
        let Some(made) = made.filter(|made| uids.contains(&made.uid)) else { continue };
        let netns = &one.attachment.netns;
        if NetNs::is_nsfs(netns) {
            debug!(ifindex = made.ifindex, "the programs are told of the pod's connections");
            connections::take_over(maps, netns, &made);
        }
    }
    Ok(())
}
