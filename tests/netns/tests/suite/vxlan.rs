//! `vxlan`, which reads the node's lease and delegates to `bridge` and `host-local`.

use std::fs;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tests_netns::{Testbed, address, connect, connect_within, gateway};

type Result<T = ()> = anyhow::Result<T>;

fn conf(t: &Testbed) -> Value {
    json!({
        "cniVersion": "1.1.0",
        "name": "net",
        "type": "vxlan",
        "subnetFile": t.state.path().join("subnet.env"),
        "dataDir": t.state.path().join("leases"),
    })
}

fn lease(t: &Testbed) -> Result {
    let text = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    Ok(fs::write(t.state.path().join("subnet.env"), text)?)
}

#[test]
fn without_a_lease_the_runtime_is_told_to_try_again() -> Result {
    let t = Testbed::new()?;
    let conf = conf(&t);
    let pod = t.pod()?;
    let (code, msg) = t.attachment("ADD", &pod, &conf)?.failure()?;
    assert_eq!(code, 11, "{msg}");
    assert_eq!(t.call("vxlan", "STATUS", &[], &conf)?.failure()?.0, 50);
    assert!(t.veths()?.is_empty() && t.leases()?.is_empty());
    t.del(&pod, &conf)
}

#[test]
fn pods_get_addresses_of_the_nodes_subnet_and_the_mtu_of_the_overlay() -> Result {
    let t = Testbed::new()?;
    lease(&t)?;
    let conf = conf(&t);
    t.call("vxlan", "STATUS", &[], &conf)?.success()?;
    let (a, b) = (t.pod()?, t.pod()?);
    let (ra, rb) = (t.add(&a, &conf)?, t.add(&b, &conf)?);
    assert!(address(&ra, 0)?.to_string().starts_with("10.244.3."), "{ra}");
    assert_eq!(gateway(&ra)?.to_string(), "10.244.3.1");
    assert_eq!(a.eth0()?.context("eth0")?.mtu, 1450);
    connect(&a.netns, &b.netns, address(&rb, 0)?)?;
    connect_within(&a.netns, &t.host, gateway(&ra)?, Duration::from_millis(500))?;

    let mut with_result = conf.clone();
    with_result["prevResult"] = ra;
    t.attachment("CHECK", &a, &with_result)?.success()?;
    // DEL works without the lease that ADD had.
    fs::remove_file(t.state.path().join("subnet.env"))?;
    for _ in 0..2 {
        t.del(&a, &with_result)?;
        t.del(&b, &conf)?;
    }
    assert!(t.veths()?.is_empty() && t.leases()?.is_empty());
    Ok(())
}

#[test]
fn gc_forwards_to_bridge_and_leases() -> Result {
    let t = Testbed::new()?;
    lease(&t)?;
    let conf = conf(&t);
    let (keep, drop) = (t.pod()?, t.pod()?);
    let kept = t.add(&keep, &conf)?;
    t.add(&drop, &conf)?;
    t.gc(&[&keep], &conf)?.success()?;
    assert_eq!(t.leases()?, [address(&kept, 0)?]);
    assert_eq!(t.veths()?.len(), 1);
    connect(&t.host, &keep.netns, address(&kept, 0)?)?;
    Ok(())
}
