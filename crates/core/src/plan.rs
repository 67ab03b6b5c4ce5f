//! What the master must know of a configuration, as plain `key=value` lines, because the master parses no TOML.

use std::time::Duration;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT` with a literal IP address; port 0 lets the system choose.
    Tcp(std::net::SocketAddr),
    /// A Unix socket's path.
    Unix(String),
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            // sockaddr_un holds 108 bytes with the terminating NUL.
            return match path.len() {
                0 => Err("a Unix socket needs a path after \"unix:\"".into()),
                1..=107 => Ok(Self::Unix(path.into())),
                n => Err(format!("a Unix socket's path is at most 107 bytes, this one has {n}")),
            };
        }
        let named = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
        named.as_deref().unwrap_or(text).parse().map(Self::Tcp).map_err(|_| {
            format!("\"{text}\" is not an address; write IP:PORT such as \"127.0.0.1:4700\", or \"unix:/path\"")
        })
    }
}

/// A program that serves a model, as far as the master must know of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPlan {
    /// The upstream's name.
    pub name: String,
    /// Tells its section from every other (`config::process::Process::fingerprint`).
    pub fingerprint: u64,
    /// Hosts of one group exclude each other.
    pub group: Option<String>,
    /// Whether it is started with the gateway and kept.
    pub is_preloaded: bool,
    /// Whether it may be started beside the one of its name that a reload has replaced.
    pub overlaps: bool,
    /// From its start until it can take a request.
    pub start: Duration,
    /// What its programs have from TERM to KILL.
    pub grace: Duration,
}

impl std::fmt::Display for HostPlan {
    /// One line; names and groups are words of letters, digits, `_` and `-`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (start, grace) = (self.start.as_millis(), self.grace.as_millis());
        let (preload, overlap) = (u8::from(self.is_preloaded), u8::from(self.overlaps));
        let group = self.group.as_deref().unwrap_or_default();
        write!(f, "{} {:016x} {preload} {overlap} {start} {grace} {group}", self.name, self.fingerprint)
    }
}

impl std::str::FromStr for HostPlan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("plan line with a bad host: {text}");
        let mut words = text.split(' ');
        let mut word = || words.next().ok_or_else(bad);
        let name = word()?.to_owned();
        let fingerprint = u64::from_str_radix(word()?, 16).map_err(|_| bad())?;
        let (is_preloaded, overlaps) = (word()? == "1", word()? == "1");
        let mut time = || word()?.parse().map(Duration::from_millis).map_err(|_| bad());
        let (start, grace) = (time()?, time()?);
        let group = Some(word()?.to_owned()).filter(|group| !group.is_empty());
        if name.is_empty() || fingerprint == 0 || words.next().is_some() {
            return Err(bad());
        }
        Ok(Self { name, fingerprint, group, is_preloaded, overlaps, start, grace })
    }
}

/// The master's part of one generation's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Public listeners, in order.
    pub listen: Vec<Address>,
    /// Whether nobody named these listeners, so that sockets which the service manager passes are taken instead.
    pub is_listen_default: bool,
    /// Whether clients need no key: then no listener may be reached from other machines.
    pub is_unguarded: bool,
    /// Whether the first TCP listener speaks TLS.
    pub is_tls: bool,
    /// Admin listener of the clerk; none turns it off.
    pub admin: Option<Address>,
    /// Fewest workers.
    pub workers_min: u32,
    /// Most workers.
    pub workers_max: u32,
    /// In-flight rows per worker on the board.
    pub slots: u32,
    /// Requests and connections waiting that call one worker more at once.
    pub backlog_high: u32,
    /// How long below a quarter of capacity before one worker goes.
    pub idle_after: Duration,
    /// Requests after which a worker is replaced; 0 is never.
    pub requests_max: u32,
    /// Age at which a worker is replaced; 0 is never.
    pub lifetime_max: Duration,
    /// Resident set at which a worker is replaced, KiB; 0 is never.
    pub rss_max_kib: u64,
    /// Resident set of all workers from which on none is added, KiB; 0 is none.
    pub rss_total_max_kib: u64,
    /// Time a worker has from its start to ready.
    pub boot_timeout: Duration,
    /// Age of the last beat at which a worker counts as hung.
    pub hang_timeout: Duration,
    /// Readiness says 503, still serving.
    pub settle: Duration,
    /// In-flight requests may finish.
    pub drain: Duration,
    /// Cancelled requests may say so.
    pub cancel: Duration,
    /// Resources may close.
    pub cleanup: Duration,
    /// Programs that serve models, each name once.
    pub hosts: Vec<HostPlan>,
    /// Lines printed for the operator once the first worker is ready; `{listen}` stands for the first address.
    pub banner: Vec<String>,
}

impl Plan {
    /// The text form.
    #[must_use]
    pub fn to_text(&self) -> String {
        use std::fmt::Write as _;
        let mut out = String::from("evergate-plan=1\n");
        let mut line = |key: &str, value: &dyn std::fmt::Display| {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{key}={value}");
        };
        for address in &self.listen {
            line("listen", address);
        }
        line("listen_default", &u8::from(self.is_listen_default));
        line("unguarded", &u8::from(self.is_unguarded));
        line("tls", &u8::from(self.is_tls));
        if let Some(address) = &self.admin {
            line("admin", address);
        }
        line("workers_min", &self.workers_min);
        line("workers_max", &self.workers_max);
        line("slots", &self.slots);
        line("backlog_high", &self.backlog_high);
        line("requests_max", &self.requests_max);
        line("rss_max_kib", &self.rss_max_kib);
        line("rss_total_max_kib", &self.rss_total_max_kib);
        for (key, value) in [
            ("idle_after_ms", self.idle_after),
            ("lifetime_max_ms", self.lifetime_max),
            ("boot_timeout_ms", self.boot_timeout),
            ("hang_timeout_ms", self.hang_timeout),
            ("settle_ms", self.settle),
            ("drain_ms", self.drain),
            ("cancel_ms", self.cancel),
            ("cleanup_ms", self.cleanup),
        ] {
            line(key, &value.as_millis());
        }
        for host in &self.hosts {
            line("host", host);
        }
        for text in &self.banner {
            line("banner", &text.replace('\n', " "));
        }
        out
    }

    /// Reads the text form.
    ///
    /// # Errors
    /// Names the line that is unknown, malformed or missing; that is a defect of ours, not of the operator's.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut plan = Self {
            listen: Vec::new(),
            is_listen_default: false,
            is_unguarded: false,
            is_tls: false,
            admin: None,
            workers_min: 0,
            workers_max: 0,
            slots: 0,
            backlog_high: 10,
            idle_after: Duration::from_secs(30),
            requests_max: 0,
            lifetime_max: Duration::ZERO,
            rss_max_kib: 0,
            rss_total_max_kib: 0,
            boot_timeout: Duration::ZERO,
            hang_timeout: Duration::ZERO,
            settle: Duration::ZERO,
            drain: Duration::ZERO,
            cancel: Duration::ZERO,
            cleanup: Duration::ZERO,
            hosts: Vec::new(),
            banner: Vec::new(),
        };
        let mut lines = text.lines();
        if lines.next() != Some("evergate-plan=1") {
            return Err("the plan has no known version line".into());
        }
        for line in lines {
            let (key, value) = line.split_once('=').ok_or_else(|| format!("plan line without '=': {line}"))?;
            let wide = || value.parse::<u64>().map_err(|_| format!("plan line with a bad number: {line}"));
            let number = || value.parse::<u32>().map_err(|_| format!("plan line with a bad number: {line}"));
            let time = || {
                let ms = value.parse::<u64>().map_err(|_| format!("plan line with a bad time: {line}"))?;
                Ok::<_, String>(Duration::from_millis(ms))
            };
            match key {
                "listen" => plan.listen.push(value.parse()?),
                "listen_default" => plan.is_listen_default = value == "1",
                "unguarded" => plan.is_unguarded = value == "1",
                "tls" => plan.is_tls = value == "1",
                "admin" => plan.admin = Some(value.parse()?),
                "workers_min" => plan.workers_min = number()?,
                "workers_max" => plan.workers_max = number()?,
                "slots" => plan.slots = number()?,
                "backlog_high" => plan.backlog_high = number()?,
                "idle_after_ms" => plan.idle_after = time()?,
                "requests_max" => plan.requests_max = number()?,
                "lifetime_max_ms" => plan.lifetime_max = time()?,
                "rss_max_kib" => plan.rss_max_kib = wide()?,
                "rss_total_max_kib" => plan.rss_total_max_kib = wide()?,
                "boot_timeout_ms" => plan.boot_timeout = time()?,
                "hang_timeout_ms" => plan.hang_timeout = time()?,
                "settle_ms" => plan.settle = time()?,
                "drain_ms" => plan.drain = time()?,
                "cancel_ms" => plan.cancel = time()?,
                "cleanup_ms" => plan.cleanup = time()?,
                "host" => plan.hosts.push(value.parse()?),
                "banner" => plan.banner.push(value.into()),
                _ => return Err(format!("unknown plan line: {line}")),
            }
        }
        if plan.listen.is_empty() || plan.workers_min == 0 || plan.workers_max < plan.workers_min || plan.slots == 0 {
            return Err("the plan lacks a listener, a worker or a slot".into());
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, group: Option<&str>) -> HostPlan {
        HostPlan {
            name: name.into(),
            fingerprint: u64::MAX - 1,
            group: group.map(str::to_owned),
            is_preloaded: true,
            overlaps: group.is_none(),
            start: Duration::from_secs(60),
            grace: Duration::from_millis(5),
        }
    }

    #[test]
    fn a_host_that_is_not_whole_is_refused() {
        let text = host("tiny", None).to_string();
        assert!(text.parse::<HostPlan>().is_ok());
        let words: Vec<&str> = text.split(' ').collect();
        for count in 0..words.len() {
            assert!(words[..count].join(" ").parse::<HostPlan>().is_err(), "{count} words");
        }
        for odd in [format!("{text}g more"), text.replace("fffe", "ffxe"), text.replace("60000", "-1")] {
            assert!(odd.parse::<HostPlan>().is_err(), "{odd}");
        }
    }

    #[test]
    fn text_form_round_trips() {
        let plan = Plan {
            listen: vec!["127.0.0.1:0".parse().unwrap(), "unix:/run/x.sock".parse().unwrap()],
            is_listen_default: true,
            is_unguarded: true,
            is_tls: true,
            admin: Some("[::1]:4701".parse().unwrap()),
            workers_min: 2,
            workers_max: 4,
            slots: 256,
            backlog_high: 7,
            idle_after: Duration::from_secs(31),
            requests_max: 1000,
            lifetime_max: Duration::from_secs(3600),
            rss_max_kib: 1 << 40,
            rss_total_max_kib: 1 << 41,
            boot_timeout: Duration::from_secs(30),
            hang_timeout: Duration::from_secs(10),
            settle: Duration::ZERO,
            drain: Duration::from_secs(20),
            cancel: Duration::from_secs(1),
            cleanup: Duration::from_secs(3),
            hosts: vec![host("tiny", Some("gpu")), host("shout", None)],
            banner: vec!["try {listen} = fine".into()],
        };
        assert_eq!(Plan::parse(&plan.to_text()), Ok(plan));
    }

    #[test]
    fn bad_addresses_say_what_to_write() {
        assert!("nonsense".parse::<Address>().unwrap_err().contains("127.0.0.1:4700"));
        assert!("unix:".parse::<Address>().is_err());
        assert!(format!("unix:/{}", "x".repeat(107)).parse::<Address>().unwrap_err().contains("107"));
        assert_eq!("localhost:80".parse::<Address>().unwrap().to_string(), "127.0.0.1:80");
    }
}
