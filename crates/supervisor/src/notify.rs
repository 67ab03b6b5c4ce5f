//! What systemd is told: a datagram of `KEY=VALUE` lines to `$NOTIFY_SOCKET` (sd_notify(3)). Without one, nothing.

use std::ffi::OsString;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use evergate_board::MasterPhase;

use crate::step::Ns;

/// Variables that are between the service manager and the master: no child gets them.
pub(crate) const VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];

/// The way to the service manager.
#[derive(Debug, Default)]
pub(crate) struct Notify {
    socket: Option<UnixDatagram>,
    /// Between two signs of life: half of what the manager allows.
    interval: Option<Ns>,
    watchdog_due: Ns,
    /// Whether it is past, and nobody was there to serve with.
    is_owed: bool,
    status: String,
    is_stopping: bool,
}

impl Notify {
    /// As the environment says. A socket that cannot be reached is as good as none.
    pub(crate) fn from_env() -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let Some(socket) = variable("NOTIFY_SOCKET").and_then(|path| connect(&path)) else { return Self::default() };
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        // Meant for another process of the service when a pid stands there that is not ours.
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let interval = number("WATCHDOG_USEC").filter(|usec| *usec > 0 && is_ours);
        Self { socket: Some(socket), interval: interval.map(|usec| usec.saturating_mul(1000) / 2), ..Self::default() }
    }

    /// The gateway serves, or serves again after [`Notify::reloading`].
    pub(crate) fn ready(&mut self) {
        self.send("READY=1");
    }

    /// A reload has begun; the manager waits for [`Notify::ready`] (`Type=notify-reload`).
    pub(crate) fn reloading(&mut self, now: Ns) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", now / 1000));
    }

    /// Tells what the master's phase means to the manager.
    pub(crate) fn enter(&mut self, phase: MasterPhase) {
        match phase {
            MasterPhase::Starting | MasterPhase::Serving => {}
            MasterPhase::Settling | MasterPhase::Draining | MasterPhase::Stopped => {
                if !std::mem::replace(&mut self.is_stopping, true) {
                    self.send("STOPPING=1");
                }
            }
        }
    }

    /// A line for `systemctl status`, sent when it changes.
    pub(crate) fn status(&mut self, text: String) {
        if self.socket.is_some() && self.status != text {
            self.send(&format!("STATUS={text}"));
            self.status = text;
        }
    }

    /// A sign of life, when one is due. To be called in every turn of the loop: a loop that does not turn sends none, and
    /// neither does one that has nobody to serve with. A stop has its own limits, so that it counts as well.
    pub(crate) fn watchdog(&mut self, workers_ready: u32, now: Ns) {
        let Some(interval) = self.interval.filter(|_| now >= self.watchdog_due) else { return };
        self.is_owed = workers_ready == 0 && !self.is_stopping;
        if !self.is_owed {
            self.watchdog_due = now.saturating_add(interval);
            self.send("WATCHDOG=1");
        }
    }

    /// When the next sign of life is due. One that waits for somebody to serve with is nothing to be woken for.
    pub(crate) fn due(&self) -> Option<Ns> {
        self.interval.filter(|_| !self.is_owed).map(|_| self.watchdog_due)
    }

    fn send(&self, text: &str) {
        if let Some(socket) = &self.socket {
            // A manager that does not read is not waited for.
            let _ = socket.send(text.as_bytes());
        }
    }
}

/// A path, or after `@` a name in the abstract namespace.
fn connect(path: &OsString) -> Option<UnixDatagram> {
    let address = match path.as_bytes().split_first()? {
        (b'@', name) => SocketAddr::from_abstract_name(name),
        (b'/', _) => SocketAddr::from_pathname(path),
        _ => return None,
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    socket.connect_addr(&address.ok()?).ok()?;
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Notify, UnixDatagram) {
        let (ours, manager) = UnixDatagram::pair().unwrap();
        manager.set_nonblocking(true).unwrap();
        (Notify { socket: Some(ours), interval: Some(100), ..Notify::default() }, manager)
    }

    fn said(manager: &UnixDatagram) -> Vec<String> {
        let one = || {
            let mut bytes = [0; 256];
            let length = manager.recv(&mut bytes).ok()?;
            Some(String::from_utf8(bytes[..length].to_vec()).unwrap())
        };
        std::iter::from_fn(one).collect()
    }

    #[test]
    fn life_is_shown_only_while_somebody_can_serve_or_all_stop() {
        let (mut notify, manager) = pair();
        notify.watchdog(0, 1000);
        assert!(said(&manager).is_empty());
        notify.watchdog(1, 1000);
        notify.watchdog(1, 1099);
        assert_eq!(said(&manager), ["WATCHDOG=1"]);
        assert_eq!(notify.due(), Some(1100));
        notify.watchdog(0, 1100);
        assert!(said(&manager).is_empty());
        assert_eq!(notify.due(), None, "a time that is past would keep the loop awake");
        notify.enter(MasterPhase::Settling);
        notify.enter(MasterPhase::Draining);
        notify.watchdog(0, 1101);
        assert_eq!(said(&manager), ["STOPPING=1", "WATCHDOG=1"]);
    }

    #[test]
    fn states_are_told_once_and_a_reload_has_its_time() {
        let (mut notify, manager) = pair();
        notify.status("2 workers ready".into());
        notify.status("2 workers ready".into());
        notify.reloading(5_000_999);
        notify.ready();
        assert_eq!(said(&manager), ["STATUS=2 workers ready", "RELOADING=1\nMONOTONIC_USEC=5000", "READY=1"]);
        // Nobody there, nobody to talk to.
        let mut silent = Notify::default();
        silent.ready();
        silent.watchdog(1, 1);
        assert_eq!(silent.due(), None);
    }

    #[test]
    fn both_kinds_of_address_are_reached() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        connect(&path.into()).unwrap().send(b"READY=1").unwrap();
        assert_eq!(manager.recv(&mut [0; 64]).unwrap(), 7);
        let name = format!("evergate-test-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        connect(&format!("@{name}").into()).unwrap().send(b"READY=1").unwrap();
        assert_eq!(manager.recv(&mut [0; 64]).unwrap(), 7);
        assert!(connect(&"vsock:2:1".into()).is_none());
        assert!(connect(&"/nobody/here".into()).is_none());
    }
}
