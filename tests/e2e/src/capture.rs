//! Seeing the packets between the nodes: a packet socket in the underlay's namespace.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, anyhow};
use cni_netlink::NetNs;

/// UDP port of the overlay.
const VXLAN_PORT: u16 = 8472;

/// What was seen of the overlay's packets.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Seen {
    /// VXLAN packets (UDP 8472).
    pub vxlan: usize,
    /// Bytes of these, outer headers included. Virtual links carry segments of up to 64 KiB unsplit, so the number
    /// of packets says little.
    pub vxlan_bytes: usize,
    /// IPv4 fragments of any kind.
    pub fragments: usize,
    /// Longest IPv4 packet in bytes, outer header included.
    pub longest: usize,
    /// IPv4 packets whose *outer* source or destination is a pod address: they left without encapsulation.
    pub bare: usize,
}

/// A capture under way.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Seen>>,
}

impl Capture {
    /// Starts to look at everything that crosses the namespace pinned at `netns`.
    ///
    /// # Errors
    /// The namespace cannot be opened.
    pub fn start(netns: &Path) -> anyhow::Result<Self> {
        let netns = NetNs::open(netns).with_context(|| format!("open {}", netns.display()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (ready_in, ready) = std::sync::mpsc::channel();
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            netns.run(move || -> anyhow::Result<Seen> {
                let socket = open()?;
                let _ = ready_in.send(());
                let mut seen = Seen::default();
                let mut frame = vec![0_u8; 65_536];
                while !told.load(Ordering::Relaxed) {
                    // SAFETY: the buffer outlives the call and its length is passed.
                    let read = unsafe {
                        libc::recv(socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0)
                    };
                    // Nothing within the socket's time-out: look at `stop` again.
                    if let Ok(read) = usize::try_from(read) {
                        seen.note(&frame[..read]);
                    }
                }
                Ok(seen)
            })
        });
        ready.recv().context("the capture did not start")?;
        Ok(Self { stop, thread })
    }

    /// Ends the capture.
    ///
    /// # Errors
    /// It broke off.
    pub fn stop(self) -> anyhow::Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the capture panicked"))?
    }
}

impl Seen {
    /// Notes one Ethernet frame.
    fn note(&mut self, frame: &[u8]) {
        const IPV4: [u8; 2] = [0x08, 0x00];
        const UDP: u8 = 17;
        let Some(packet) = frame.get(14..).filter(|_| frame[12..14] == IPV4) else { return };
        if packet.len() < 20 {
            return;
        }
        let word = |at: usize| packet.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
        // The three flag bits and the offset: more fragments, or not the first one.
        if word(6).is_some_and(|flags| flags & 0x3fff != 0) {
            self.fragments += 1;
        }
        self.longest = self.longest.max(word(2).unwrap_or_default().into());
        let pod = |at: usize| packet.get(at..at + 2) == Some(&[10, 244]);
        if pod(12) || pod(16) {
            self.bare += 1;
        }
        let header = usize::from(packet[0] & 0x0f) * 4;
        if packet[9] == UDP && word(header + 2) == Some(VXLAN_PORT) {
            self.vxlan += 1;
            self.vxlan_bytes += packet.len();
        }
    }
}

fn open() -> anyhow::Result<OwnedFd> {
    let protocol = i32::from(u16::try_from(libc::ETH_P_ALL)?.to_be());
    // SAFETY: no pointers are passed.
    let fd =
        unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("open a packet socket");
    }
    // SAFETY: the descriptor was just opened and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // Every packet is seen several times, on each port that it crosses; the usual 200 KiB would lose most of them.
    let room: libc::c_int = 64 << 20;
    let limit = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
    set(&socket, libc::SO_RCVBUFFORCE, &room).context("enlarge the buffer of a packet socket")?;
    set(&socket, libc::SO_RCVTIMEO, &limit).context("set the time-out of a packet socket")?;
    Ok(socket)
}

/// Sets a socket option whose value is the plain C type `T`.
fn set<T>(socket: &OwnedFd, option: libc::c_int, value: &T) -> anyhow::Result<()> {
    let size = u32::try_from(size_of::<T>())?;
    // SAFETY: the value outlives the call and its size is passed.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_ref(value).cast(),
            size,
        )
    };
    if set != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(flags: u16, port: u16, src: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend(100_u16.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(flags.to_be_bytes());
        frame.extend([64, 17, 0, 0]);
        frame.extend(src);
        frame.extend([172, 30, 0, 12]);
        frame.extend([0x12, 0x34]);
        frame.extend(port.to_be_bytes());
        frame.resize(114, 0);
        frame
    }

    #[test]
    fn an_overlay_packet_a_fragment_and_a_bare_pod_packet_are_told_apart() {
        let mut seen = Seen::default();
        seen.note(&frame(0x4000, 8472, [172, 30, 0, 11]));
        assert_eq!(seen, Seen { vxlan: 1, vxlan_bytes: 100, fragments: 0, longest: 100, bare: 0 });
        seen.note(&frame(0x2000, 53, [172, 30, 0, 11]));
        assert_eq!((seen.vxlan, seen.fragments), (1, 1));
        seen.note(&frame(0, 80, [10, 244, 1, 7]));
        assert_eq!(seen.bare, 1);
        seen.note(&[0; 10]);
    }
}
