//! DEL answers when the pair is gone, not when the kernel has freed its memory (`cni_netlink`, `removal.rs`): nobody can
//! tell the difference, and nothing stays.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use cni_netlink::{NetNs, Netlink, VethPair};
use std::os::fd::AsFd as _;
use tests_netns::{Testbed, address, connect, gateway};

type Result<T = ()> = anyhow::Result<T>;

const SUBNET: &str = "10.88.0.0/29";
const ROUNDS: usize = 20;
/// How long what finishes a removal may live on: the kernel takes some 30 ms, beside busy neighbours more.
const PATIENCE: Duration = Duration::from_secs(10);

/// Processes that run a program of this folder. One that has ended is none, whether its parent has noticed or not.
fn processes_of(folder: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir("/proc")? {
        let program = fs::read_link(entry?.path().join("exe"));
        count += usize::from(program.is_ok_and(|program| program.starts_with(folder)));
    }
    Ok(count)
}

#[test]
fn what_del_removed_is_gone_when_it_answers() -> Result {
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET]);
    // One pod for the whole time: names, MACs and addresses of all rounds meet on its bridge.
    let stays = t.pod()?;
    let gateway = gateway(&t.add(&stays, &conf)?)?;
    let pod = t.pod()?;
    for round in 0..ROUNDS {
        let result = t.add(&pod, &conf).with_context(|| format!("round {round}"))?;
        let ip = address(&result, 0)?;
        connect(&t.host, &pod.netns, ip)?;
        t.del(&pod, &conf)?;
        // All at once, before anything else can have happened.
        assert!(pod.eth0()?.is_none(), "round {round}: eth0 is in the pod");
        assert_eq!(t.veths()?.len(), 1, "round {round}");
        assert_eq!(t.leases()?.len(), 1, "round {round}");
        // The address is free, so nobody may answer under it.
        let reached = connect_to(&t.host, (ip, 80).into());
        assert!(reached.is_err(), "round {round}: {ip} still answers");
    }
    connect(&stays.netns, &t.host, gateway)?;
    Ok(())
}

fn connect_to(from: &NetNs, to: std::net::SocketAddr) -> Result {
    from.run(|| {
        std::net::TcpStream::connect_timeout(&to, Duration::from_millis(50))?;
        Ok(())
    })
}

#[test]
fn no_process_of_a_del_stays() -> Result {
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET]);
    for _ in 0..3 {
        let pod = t.pod()?;
        t.add(&pod, &conf)?;
        t.del(&pod, &conf)?;
    }
    let deadline = Instant::now() + PATIENCE;
    while processes_of(&t.plugins)? > 0 {
        ensure!(Instant::now() < deadline, "a process of the plugin lives on");
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// An init that never waits for those who are left to it, and says in the end how many of them have ended.
const INIT: &str = r#"
    if (!fork) { exec "sh", $ARGV[0] }
    select undef, undef, undef, 0.05 while !-e $ARGV[1];
    select undef, undef, undef, 0.5;
    open C, "/proc/1/task/1/children";
    print scalar grep { open F, "/proc/$_/stat"; <F> =~ /\(bridge\) Z / } split " ", <C>;
"#;

#[test]
fn not_many_are_left_to_an_init_that_takes_no_notice() -> Result {
    const DELS: usize = 80;
    if Command::new("perl").arg("-v").output().is_err() {
        eprintln!("skipped: perl, the init of this test, is not installed");
        return Ok(());
    }
    let t = Testbed::new()?;
    let conf = t.conf(&["10.88.0.0/16"]);
    let done = t.state.path().join("done");
    let mut script =
        format!("export CNI_COMMAND=DEL CNI_IFNAME=eth0 CNI_PATH={}\n", t.plugins.display());
    let mut pods = Vec::new();
    for _ in 0..DELS {
        let pod = t.pod()?;
        t.add(&pod, &conf)?;
        script.push_str(&format!("echo '{conf}' | CNI_CONTAINERID={} $CNI_PATH/bridge\n", pod.id));
        pods.push(pod);
    }
    script.push_str(&format!("touch {}\n", done.display()));
    let path = t.state.path().join("dels.sh");
    fs::write(&path, script)?;
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "perl", "-e", INIT]).arg(path).arg(&done);
    let output = t.host.run(|| command.output().context("run unshare"))?;
    let left: usize =
        String::from_utf8_lossy(&output.stdout).parse().with_context(|| format!("{output:?}"))?;
    assert!((1..=64).contains(&left), "{left} are left");
    assert!(t.veths()?.is_empty() && t.leases()?.is_empty());
    Ok(())
}

/// A pair whose host end has another name than ours: the reference plugin made it, before the node was switched over.
#[test]
fn a_pair_of_another_plugin_is_gone_when_del_answers() -> Result {
    let t = Testbed::new()?;
    let pod = t.pod()?;
    t.netlink.create_veth(&VethPair {
        name: "veth1a2b3c4d".to_owned(),
        peer_name: "eth0".to_owned(),
        peer_netns: Some(pod.netns.as_fd()),
        up: true,
        ..VethPair::default()
    })?;
    t.del(&pod, &t.conf(&[SUBNET]))?;
    assert!(pod.eth0()?.is_none());
    assert!(t.veths()?.is_empty());
    // Another one of these names can be made at once.
    let inside = Netlink::open_in(&pod.netns)?;
    inside.create_veth(&VethPair {
        name: "eth0".to_owned(),
        peer_name: "other".to_owned(),
        ..VethPair::default()
    })?;
    Ok(())
}

/// What finishes a removal is held up for seconds, and the runtime reads the plugin's stdout and stderr to their end.
#[test]
fn a_runtime_that_reads_to_the_end_is_not_held_up_by_what_stays() -> Result {
    if Command::new("strace").arg("-V").output().is_err() {
        eprintln!("skipped: strace is not installed");
        return Ok(());
    }
    let t = Testbed::new()?;
    let conf = t.conf(&[SUBNET]);
    let pod = t.pod()?;
    t.add(&pod, &conf)?;
    let fifo = t.state.path().join("said");
    let made = Command::new("mkfifo").arg(&fifo).status()?;
    ensure!(made.success(), "mkfifo");
    // The plugin alone has the pipe; strace, which waits for all, has not. It returns late from the first request of
    // each process: of the one that answers, and of the one that stays.
    let script = format!("exec \"$0\" >{} 2>&1", fifo.display());
    let observer = [
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=sendto",
        "-e",
        "inject=sendto:delay_exit=3000000:when=1",
        "sh",
        "-c",
        &script,
    ];
    let netns = pod.path();
    let variables = [
        ("CNI_COMMAND", "DEL"),
        ("CNI_CONTAINERID", pod.id.as_str()),
        ("CNI_NETNS", &netns),
        ("CNI_IFNAME", "eth0"),
    ];
    let observed = t.start_under(&observer, "bridge", &variables, &conf)?;
    let said = fs::read(&fifo)?;
    let alive = processes_of(&t.plugins)?;
    assert!(said.is_empty() && pod.eth0()?.is_none(), "DEL was not done");
    assert_eq!(alive, 1, "the end came with that of the last process, not with that of the first");
    assert!(observed.wait_with_output()?.status.success());
    Ok(())
}
