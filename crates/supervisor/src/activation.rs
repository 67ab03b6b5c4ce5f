//! Sockets that the service manager has bound and passed on: `LISTEN_FDS` and its companions (sd_listen_fds(3)).

use std::os::fd::OwnedFd;

use evergate_core::plan::{Address, Plan};
use rustix::net::{SocketAddrAny, SocketAddrUnix, SocketType, sockopt};

use crate::listen::Listener;
use crate::succeed::{guard, is_same};
use crate::{Failure, talk};

/// The first that is passed.
const FIRST: i32 = 3;
/// More than a sane unit has; descriptors can be adopted up to 63.
const COUNT_MAX: i32 = 32;
/// In `FileDescriptorName=` of a socket unit: this one is for the admin listener.
const ADMIN: &str = "admin";

/// A passed socket.
#[derive(Debug)]
struct Passed {
    listener: Listener,
    name: String,
}

/// Sockets that were passed and have found no use yet.
#[derive(Debug, Default)]
pub(crate) struct Activation(Vec<Passed>);

impl Activation {
    /// Takes what was passed to this very process. To be called before anything else opens a descriptor that another might
    /// take for one of these.
    pub(crate) fn take() -> Result<Self, Failure> {
        let number = |name: &str| std::env::var(name).ok()?.parse::<i32>().ok();
        let is_ours = number("LISTEN_PID").is_some_and(|pid| i64::from(pid) == i64::from(std::process::id()));
        let Some(count) = number("LISTEN_FDS").filter(|count| is_ours && *count > 0) else {
            return Ok(Self::default());
        };
        if count > COUNT_MAX {
            return Err(Failure::system(format!("{count} sockets were passed (LISTEN_FDS); {COUNT_MAX} are the most")));
        }
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut passed = Vec::new();
        for fd in (FIRST..).take(usize::try_from(count).unwrap_or(0)) {
            let listener = adopt(fd).map_err(|why| {
                Failure::system(format!("the passed descriptor {fd} (LISTEN_FDS) cannot be used: {why}"))
            })?;
            passed.push(Passed { listener, name: names.next().unwrap_or_default().to_owned() });
        }
        Ok(Self(passed))
    }

    /// The socket that listens at this address.
    pub(crate) fn find(&mut self, address: &Address) -> Option<Listener> {
        let at = self.0.iter().position(|passed| is_same(&passed.listener.address, address))?;
        Some(self.0.remove(at).listener)
    }

    /// The socket named `admin`.
    pub(crate) fn admin(&mut self) -> Option<Listener> {
        let at = self.0.iter().position(|passed| passed.name == ADMIN)?;
        Some(self.0.remove(at).listener)
    }

    /// What the public listeners are when the configuration names none: all that were passed, if any were.
    pub(crate) fn all(&mut self, plan: &Plan) -> Result<Vec<Listener>, Failure> {
        let listeners: Vec<Listener> = std::mem::take(&mut self.0).into_iter().map(|passed| passed.listener).collect();
        let guarded = guard(plan, listeners.iter().map(|listener| &listener.address));
        guarded.map_err(|text| Failure { code: evergate_core::inherit::code::CONFIG, text })?;
        Ok(listeners)
    }

    /// What has found no use would keep its clients waiting for ever, so that it is a mistake.
    pub(crate) fn finish(self, plan: &Plan) -> Result<(), Failure> {
        let Some(unused) = self.0.first() else { return Ok(()) };
        let listen: Vec<String> = plan.listen.iter().map(ToString::to_string).collect();
        talk::say(&format!("configured are {}", listen.join(", ")));
        Err(Failure {
            code: evergate_core::inherit::code::CONFIG,
            text: format!(
                "a socket at {} was passed (LISTEN_FDS), which neither [server] listen nor [admin] listen names",
                unused.listener.address
            ),
        })
    }
}

fn adopt(fd: i32) -> Result<Listener, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let fd: OwnedFd = evergate_sys::adopt(fd).map_err(|error| words(&error))?;
    if sockopt::socket_type(&fd).map_err(|error| words(&error))? != SocketType::STREAM {
        return Err("it is no stream socket".into());
    }
    if !sockopt::socket_acceptconn(&fd).map_err(|error| words(&error))? {
        return Err("it does not listen (Accept=yes is not for this program)".into());
    }
    let address = address(&rustix::net::getsockname(&fd).map_err(|error| words(&error))?)?;
    rustix::io::ioctl_fionbio(&fd, true).map_err(|error| words(&error))?;
    Ok(Listener::passed(fd, address))
}

fn address(real: &SocketAddrAny) -> Result<Address, String> {
    if let Ok(address) = std::net::SocketAddr::try_from(real.clone()) {
        return Ok(Address::Tcp(address));
    }
    let unix = SocketAddrUnix::try_from(real.clone()).map_err(|_| "it is neither TCP nor a Unix socket")?;
    let path = unix.path().and_then(|path| path.to_str().ok().map(str::to_owned));
    path.map(Address::Unix).ok_or_else(|| "its Unix address is no path".to_owned())
}
