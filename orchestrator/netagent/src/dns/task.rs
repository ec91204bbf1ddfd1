//! Keeps the zone and the server's address.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cni_netlink::{AddressOptions, Netlink, NetlinkError};
use ipnetwork::IpNetwork;
use k8s_openapi::api::core::v1::{Namespace, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use orch_reconcile::Informer;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::server::Server;
use super::zone::{Zone, desired_zone};
use crate::chain;

/// Changes within this time are one new zone.
const GATHER: Duration = Duration::from_millis(20);
/// The server starts without the cluster's names after this time: names outside are better than none. Less than a stub
/// resolver's 5 s.
const ZONE_WAIT: Duration = Duration::from_secs(3);
/// How often the address is looked after.
const ADDRESS_CHECK: Duration = Duration::from_secs(10);

/// Follows the cluster and publishes its zone until cancelled.
pub(crate) async fn follow(
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    namespaces: Informer<Namespace>,
    zone: watch::Sender<Option<Arc<Zone>>>,
    cancel: CancellationToken,
) {
    let mut changes = (services.changed(), slices.changed(), namespaces.changed());
    tokio::select! {
        () = cancel.cancelled() => return,
        () = async { services.synced().await; slices.synced().await; namespaces.synced().await; } => {}
    }
    loop {
        changes.0.borrow_and_update();
        changes.1.borrow_and_update();
        changes.2.borrow_and_update();
        let now = desired_zone(&services.list(), &slices.list(), &namespaces.list());
        zone.send_if_modified(|zone| {
            let changed = zone.as_deref() != Some(&now);
            if changed {
                *zone = Some(Arc::new(now));
            }
            changed
        });
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = changes.0.changed() => if changed.is_err() { return },
            changed = changes.1.changed() => if changed.is_err() { return },
            changed = changes.2.changed() => if changed.is_err() { return },
        }
        sleep(GATHER).await;
    }
}

/// Keeps the server's address on the loopback link and serves there, until cancelled. The address stays.
pub(crate) async fn serve(ip: IpAddr, server: Server, cancel: CancellationToken) {
    let mut complained = false;
    // A server without its address could only fail.
    hold_address(ip, &mut complained).await;
    // Clients ask again when they hear nothing, but believe a failure.
    let mut zone = server.zone.clone();
    tokio::select! {
        () = cancel.cancelled() => return,
        _ = timeout(ZONE_WAIT, zone.wait_for(Option::is_some)) => {}
    }
    let mut check = interval(ADDRESS_CHECK);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut serving = std::pin::pin!(server.run(cancel));
    loop {
        tokio::select! {
            () = &mut serving => return,
            _ = check.tick() => hold_address(ip, &mut complained).await,
        }
    }
}

async fn hold_address(ip: IpAddr, complained: &mut bool) {
    match tokio::task::spawn_blocking(move || ensure_address(ip)).await {
        Ok(Ok(true)) => info!(%ip, "cluster DNS address added to lo"),
        Ok(Ok(false)) => *complained = false,
        Ok(Err(error)) if !std::mem::replace(complained, true) => {
            warn!(%ip, error = chain(&error), "the cluster DNS address cannot be added to lo; pods have no DNS");
        }
        Ok(Err(_)) => {}
        Err(error) => warn!(%error, "looking after the cluster DNS address failed"),
    }
}

fn ensure_address(ip: IpAddr) -> Result<bool, NetlinkError> {
    let netlink = Netlink::open()?;
    let Some(loopback) = netlink.link("lo")? else { return Ok(false) };
    if !loopback.up {
        netlink.set_up(loopback.index)?;
    }
    if netlink.addresses(loopback.index)?.iter().any(|address| address.ip() == ip) {
        return Ok(false);
    }
    let address = IpNetwork::from(ip);
    let options = AddressOptions { nodad: true, ..AddressOptions::default() };
    netlink.add_address(loopback.index, address, &options).map(|()| true)
}
