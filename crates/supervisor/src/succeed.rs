//! Whether a configuration can follow another without a restart: listeners and the board stay what they are.

use evergate_core::inherit::code;
use evergate_core::plan::{Address, Plan};

use crate::step::{Next, Refusal};

/// What was made at the start and lasts as long as the master.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    /// Where the public listeners really are.
    pub(crate) listen: Vec<Address>,
    /// Whether the service manager passed all of them.
    pub(crate) are_passed: bool,
    /// Where the admin listener really is.
    pub(crate) admin: Option<Address>,
    /// Rows on the board for the clerk and the workers.
    pub(crate) rows: u32,
    /// Rows for hosts.
    pub(crate) host_rows: u32,
}

fn to_usize(count: u32) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

/// The rules of a configuration that is to follow another without a restart.
///
/// # Errors
/// Names the keys that only a restart can change: `first` is what `bound` was made for.
pub(crate) fn succeed(first: &Plan, bound: &Bound, next: &Plan) -> Result<Next, Refusal> {
    let mut keys = Vec::new();
    let mut fixed = |key: &str, is_same: bool, what: &str| {
        if !is_same {
            keys.push(format!("{key} cannot be changed by a reload{what}; it needs a restart"));
        }
    };
    fixed("[server] listen", bound.has_public(first, next), "");
    fixed("[server] tls", first.is_tls == next.is_tls, " from off to on or back (certificates can be renewed)");
    fixed("[admin] listen", bound.has_admin(first, next), "");
    fixed("[workers] slots", next.slots <= first.slots, &format!(" to more than the {} of the start", first.slots));
    let room = bound.rows.saturating_sub(2) / 2;
    fixed("[workers] max", next.workers_max <= room, &format!(" to more than {room}, for which the board was made"));
    fixed(
        "the number of [upstreams.NAME.process]",
        next.hosts.len() <= to_usize(bound.host_rows),
        &format!(" to more than {}, for which the board was made", bound.host_rows),
    );
    keys.extend(guard(next, &bound.listen).err());
    if keys.is_empty() { Ok(Next::of_plan(next)) } else { Err(Refusal { code: code::CONFIG, why: keys.join("\n") }) }
}

impl Bound {
    /// Whether these listeners are what a plan asks for: the addresses as they were written for the first one, or those
    /// that came of it. Sockets that were passed are the listeners of every plan that names none.
    fn has_public(&self, first: &Plan, next: &Plan) -> bool {
        if self.are_passed && next.is_listen_default {
            return true;
        }
        let is_as_written = first.listen == next.listen && !(self.are_passed && first.is_listen_default);
        let is_here = |address: &Address| self.listen.iter().any(|bound| is_same(bound, address));
        is_as_written || (next.listen.len() == self.listen.len() && next.listen.iter().all(is_here))
    }

    fn has_admin(&self, first: &Plan, next: &Plan) -> bool {
        let is_here = matches!((&self.admin, &next.admin), (Some(bound), Some(next)) if is_same(bound, next));
        first.admin == next.admin || is_here
    }
}

/// The rule that the configuration's own addresses are checked by, for sockets that it does not name.
///
/// # Errors
/// Says which listener can be reached from other machines although clients need no key.
pub(crate) fn guard<'a>(plan: &Plan, listen: impl IntoIterator<Item = &'a Address>) -> Result<(), String> {
    let is_open = |address: &&Address| match address {
        Address::Tcp(address) => !address.ip().to_canonical().is_loopback(),
        Address::Unix(_) => false,
    };
    let Some(open) = listen.into_iter().find(is_open).filter(|_| plan.is_unguarded) else { return Ok(()) };
    Err(format!(
        "the passed socket at {open} can be reached from other machines, and clients need no key; set [server] auth = \
         \"keys\""
    ))
}

/// `[::ffff:127.0.0.1]` and `127.0.0.1` are one place.
pub(crate) fn is_same(one: &Address, other: &Address) -> bool {
    match (one, other) {
        (Address::Tcp(one), Address::Tcp(other)) => {
            one.port() == other.port() && one.ip().to_canonical() == other.ip().to_canonical()
        }
        _ => one == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "evergate-plan=1\nlisten=127.0.0.1:0\nadmin=127.0.0.1:2\nworkers_min=1\nworkers_max=4\nslots=16\n";

    fn plan(from: &str, to: &str) -> Plan {
        assert!(TEXT.contains(from));
        Plan::parse(&TEXT.replace(from, to)).unwrap()
    }

    fn bound(listen: &[&str], are_passed: bool) -> Bound {
        let listen = listen.iter().map(|address| address.parse().unwrap()).collect();
        Bound { listen, are_passed, admin: Some("127.0.0.1:2".parse().unwrap()), rows: 64, host_rows: 8 }
    }

    #[test]
    fn what_only_a_restart_can_change_is_named() {
        let first = plan("", "");
        let judge = |from: &str, to: &str| succeed(&first, &bound(&["127.0.0.1:81"], false), &plan(from, to));
        assert_eq!(judge("", "").unwrap(), Next::of_plan(&first));
        assert_eq!(judge("slots=16", "slots=8").unwrap().rules.slots, 8);
        assert_eq!(judge("max=4", "max=31").unwrap().rules.workers_max, 31);
        assert!(judge("127.0.0.1:0", "127.0.0.1:81").is_ok(), "the port that the system chose");
        let host = "host=a 0000000000000001 0 0 1 1 \n";
        assert!(judge("admin", &format!("{}admin", host.repeat(8))).is_ok());
        for (from, to, key) in [
            ("127.0.0.1:0", "127.0.0.1:3", "[server] listen"),
            ("127.0.0.1:0", "127.0.0.1:81\nlisten=127.0.0.1:82", "[server] listen"),
            ("admin=127.0.0.1:2\n", "", "[admin] listen"),
            ("slots=16", "slots=17", "[workers] slots"),
            ("max=4", "max=32", "[workers] max"),
            ("admin", "tls=1\nadmin", "[server] tls"),
            ("admin", &*format!("{}admin", host.repeat(9)), "the number of [upstreams.NAME.process]"),
        ] {
            let refusal = judge(from, to).unwrap_err();
            assert!(refusal.code == 78 && refusal.why.contains(key), "{refusal:?}");
        }
    }

    /// Specification, line 30: sockets of the service manager stay the listeners, named or not.
    #[test]
    fn s30_passed_sockets_may_be_named_later_and_others_not() {
        let unnamed = plan("admin", "listen_default=1\nadmin");
        let named = plan("127.0.0.1:0", "[::ffff:127.0.0.1]:81");
        let passed = bound(&["127.0.0.1:81"], true);
        for (first, next) in [(&unnamed, &unnamed), (&unnamed, &named), (&named, &unnamed), (&named, &named)] {
            assert!(succeed(first, &passed, next).is_ok(), "{next:?}");
        }
        // What an unnamed listener is called when nothing is passed is another place.
        let other = plan("", "");
        assert!(succeed(&unnamed, &passed, &other).unwrap_err().why.contains("[server] listen"));
        // And what was bound by ourselves is not where a restart without a name would be.
        let own = bound(&["127.0.0.1:81"], false);
        let elsewhere = plan("127.0.0.1:0", "127.0.0.1:4700\nlisten_default=1");
        assert!(succeed(&named, &own, &elsewhere).is_err());
        // The admin listener may be named by where it is.
        let mut admin = bound(&["127.0.0.1:81"], false);
        admin.admin = Some("127.0.0.1:9".parse().unwrap());
        assert!(succeed(&other, &admin, &plan("127.0.0.1:2", "127.0.0.1:9")).is_ok());
        assert!(succeed(&other, &admin, &plan("127.0.0.1:2", "127.0.0.1:8")).is_err());
    }

    #[test]
    fn s30_a_passed_socket_open_to_all_keeps_its_keys() {
        let guarded = plan("admin", "listen_default=1\nadmin");
        let unguarded = plan("admin", "listen_default=1\nunguarded=1\nadmin");
        let open = bound(&["unix:/run/x", "0.0.0.0:81"], true);
        assert!(succeed(&guarded, &open, &guarded).is_ok());
        let refusal = succeed(&guarded, &open, &unguarded).unwrap_err();
        assert!(refusal.code == 78 && refusal.why.contains("0.0.0.0:81"), "{refusal:?}");
        assert!(succeed(&guarded, &bound(&["unix:/run/x", "127.0.0.1:81"], true), &unguarded).is_ok());
    }
}
