//! Base URLs of upstreams: what is accepted, and the addresses that are always refused.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{BaseUrl, Transport};
use crate::plan::Address;

/// Names under which clouds answer with a machine's own credentials.
const METADATA_NAMES: [&str; 4] =
    ["metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"];

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (authority, path) = (&self.authority, &self.path);
        match &self.transport {
            Transport::Http { .. } => write!(f, "http://{authority}{path}"),
            Transport::Https { .. } => write!(f, "https://{authority}{path}"),
            Transport::Unix { path: socket } if path.is_empty() => write!(f, "unix:{socket}"),
            Transport::Unix { path: socket } => write!(f, "unix:{socket}:{path}"),
        }
    }
}

impl std::str::FromStr for BaseUrl {
    type Err = String;

    /// Reads `http://HOST[:PORT][/PATH]`, `https://...` or `unix:/SOCKET[:/PATH]`. Trailing slashes are cut off.
    ///
    /// # Errors
    /// Says what is wrong; also for link-local and cloud metadata addresses, which are never called.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(byte) = text.bytes().find(|byte| !byte.is_ascii_graphic()) {
            let what = if byte.is_ascii() { "white space or a control character" } else { "a non-ASCII character" };
            return Err(format!("the URL contains {what}"));
        }
        if let Some(rest) = text.strip_prefix("unix:") {
            return unix(rest);
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(|| {
            format!("\"{text}\" is not a URL; write https://HOST/v1, http://HOST:PORT/v1 or unix:/path/to.sock:/v1")
        })?;
        let default_port = match scheme {
            "https" => 443,
            "http" => 80,
            _ => return Err(format!("the scheme \"{scheme}\" is not supported; use https, http or unix")),
        };
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let path = prefix(path)?;
        if authority.contains('@') {
            // Nothing of it is repeated: what stands before the @ is a password.
            return Err("the URL carries a user or password; put the credential into api_key".into());
        }
        let (host, port) = host_and_port(authority)?;
        refuse_metadata(&host)?;
        let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let port_or_default = port.unwrap_or(default_port);
        let authority =
            if port_or_default == default_port { bracketed } else { format!("{bracketed}:{port_or_default}") };
        let transport = match scheme {
            "https" => Transport::Https { host, port: port_or_default },
            _ => Transport::Http { host, port: port_or_default },
        };
        Ok(Self { transport, authority, path })
    }
}

fn unix(rest: &str) -> Result<BaseUrl, String> {
    let (socket, path) = rest.split_once(":/").map_or((rest, ""), |(socket, _)| rest.split_at(socket.len()));
    if !socket.starts_with('/') {
        return Err("a Unix socket needs its whole path, such as unix:/run/model.sock:/v1".into());
    }
    // The limit on the length of a path is the same as for our own listeners.
    format!("unix:{socket}").parse::<Address>()?;
    let path = prefix(path.trim_start_matches(':'))?;
    Ok(BaseUrl { transport: Transport::Unix { path: socket.into() }, authority: "localhost".into(), path })
}

/// The path without trailing slashes.
fn prefix(path: &str) -> Result<String, String> {
    if path.contains(['?', '#']) {
        return Err(
            "the URL has a query or fragment; write only the path in front of the endpoints, such as /v1".into()
        );
    }
    if let Some(bad) = path.chars().find(|c| "\"<>\\^`{|}".contains(*c)) {
        return Err(format!("the URL's path contains '{bad}'; percent-encode it"));
    }
    let path = path.trim_end_matches('/');
    for endpoint in ["/chat/completions", "/completions", "/embeddings", "/models"] {
        if let Some(base) = path.strip_suffix(endpoint) {
            return Err(format!("leave out \"{endpoint}\": endpoints are appended to the base URL's path \"{base}\""));
        }
    }
    if path.split('/').skip(1).any(|segment| matches!(segment, "" | "." | "..")) {
        return Err(format!("the URL's path \"{path}\" has an empty, \".\" or \"..\" segment"));
    }
    Ok(path.into())
}

fn host_and_port(authority: &str) -> Result<(String, Option<u16>), String> {
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']').ok_or("the URL's address lacks its closing bracket")?;
        let address: Ipv6Addr = host.parse().map_err(|_| format!("\"[{host}]\" is not an IPv6 address"))?;
        (address.to_string(), port)
    } else {
        let (host, port) = authority.split_at(authority.find(':').unwrap_or(authority.len()));
        (host_name(host)?, port)
    };
    let wrong = || format!("\"{}\" is not a port; write a number from 1 to 65535", port.trim_start_matches(':'));
    let port = match port {
        "" => None,
        _ => {
            let digits = port.strip_prefix(':').filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            Some(digits.and_then(|text| text.parse::<u16>().ok()).filter(|port| *port > 0).ok_or_else(wrong)?)
        }
    };
    Ok((host, port))
}

/// A host name in lower case, or an IPv4 address.
fn host_name(host: &str) -> Result<String, String> {
    if host.is_empty() {
        return Err("the URL has no host".into());
    }
    let host = host.to_ascii_lowercase();
    let is_label = |label: &str| {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(is_plain)
    };
    let name = host.strip_suffix('.').unwrap_or(&host);
    if name.len() > 253 || !name.split('.').all(is_label) {
        return Err(format!("\"{host}\" is not a host name"));
    }
    // Resolvers read 2852039166, 0xa9fea9fe and 169.254.43518 as addresses; a name never ends in a number (WHATWG
    // URL, "ends in a number"), so what is not a plain address here is an attempt to hide one, or a slip.
    let last = name.rsplit('.').next().unwrap_or_default();
    let ends_in_number = last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x");
    if ends_in_number && name.parse::<Ipv4Addr>().is_err() {
        return Err(format!("\"{host}\" is not an IPv4 address; write all four numbers, such as 192.0.2.1"));
    }
    Ok(if ends_in_number { name.into() } else { host })
}

fn refuse_metadata(host: &str) -> Result<(), String> {
    let name = host.trim_end_matches('.');
    let is_refused = METADATA_NAMES.contains(&name) || name.parse().is_ok_and(is_metadata);
    if is_refused {
        return Err(format!("\"{host}\" is a link-local or cloud metadata address, which is never called"));
    }
    Ok(())
}

fn is_metadata(address: IpAddr) -> bool {
    match address {
        // The last one is Alibaba Cloud's metadata service.
        IpAddr::V4(v4) => v4.is_link_local() || v4 == Ipv4Addr::new(100, 100, 100, 200),
        IpAddr::V6(v6) => {
            let is_local = v6.is_unicast_link_local() || v6 == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
            is_local || embedded(v6).is_some_and(|v4| is_metadata(IpAddr::V4(v4)))
        }
    }
}

/// The IPv4 address inside a mapped (`::ffff:0:0/96`), compatible (`::/96`) or NAT64 (`64:ff9b::/96`) one.
fn embedded(v6: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, high, low] = v6.segments();
    let is_embedded = matches!([a, b, c, d, e, f], [0, 0, 0, 0, 0, 0 | 0xffff] | [0x64, 0xff9b, 0, 0, 0, 0]);
    is_embedded.then(|| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)))
}

impl BaseUrl {
    /// Whether a call to it comes to who listens at `address`, as far as that can be said without looking names up.
    #[must_use]
    pub(crate) fn reaches(&self, address: &Address) -> bool {
        match (&self.transport, address) {
            (Transport::Http { host, port } | Transport::Https { host, port }, Address::Tcp(own)) => {
                let own_ip = own.ip().to_canonical();
                let (is_all, is_loopback) = (own_ip.is_unspecified(), own_ip.is_loopback());
                let is_host = match host.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
                    // Which addresses are this machine's is not known here, but for these.
                    Ok(ip) => ip == own_ip || (is_all && ip.is_loopback()) || (ip.is_unspecified() && is_loopback),
                    Err(_) => host == "localhost" && (is_all || is_loopback),
                };
                own.port() != 0 && *port == own.port() && is_host
            }
            (Transport::Unix { path }, Address::Unix(own)) => path == own,
            _ => false,
        }
    }

    /// Whether what is sent to it can be read on the way: plain HTTP to anything but this machine.
    #[must_use]
    pub fn is_exposed(&self) -> bool {
        let Transport::Http { host, .. } = &self.transport else { return false };
        host != "localhost" && !host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<BaseUrl, String> {
        text.parse()
    }

    #[test]
    fn an_address_of_this_machine_is_known_again() {
        for (url, address, reaches) in [
            ("http://127.0.0.1:4700/v1", "127.0.0.1:4700", true),
            ("https://localhost:4700/v1", "127.0.0.1:4700", true),
            ("http://[::ffff:127.0.0.1]:4700", "127.0.0.1:4700", true),
            ("http://127.0.0.1:4700", "0.0.0.0:4700", true),
            ("http://0.0.0.0:4700", "127.0.0.1:4700", true),
            ("http://192.0.2.1:80", "192.0.2.1:80", true),
            ("http://192.0.2.1:80", "0.0.0.0:80", false),
            ("http://127.0.0.1:4701/v1", "127.0.0.1:4700", false),
            ("http://127.0.0.1:80", "127.0.0.1:0", false),
            ("http://example.org:4700", "127.0.0.1:4700", false),
            ("unix:/run/x.sock:/v1", "unix:/run/x.sock", true),
            ("unix:/run/y.sock:/v1", "unix:/run/x.sock", false),
        ] {
            assert_eq!(parse(url).unwrap().reaches(&address.parse().unwrap()), reaches, "{url} {address}");
        }
    }

    #[test]
    fn good_urls_keep_their_parts_and_read_back() {
        for (text, authority, path, shown) in [
            ("https://api.openai.com/v1", "api.openai.com", "/v1", "https://api.openai.com/v1"),
            ("https://API.example.com:443/v1/", "api.example.com", "/v1", "https://api.example.com/v1"),
            ("http://127.0.0.1:8080", "127.0.0.1:8080", "", "http://127.0.0.1:8080"),
            ("http://localhost:80/a/b//", "localhost", "/a/b", "http://localhost/a/b"),
            ("http://[::1]:9/v1", "[::1]:9", "/v1", "http://[::1]:9/v1"),
            ("unix:/run/m.sock", "localhost", "", "unix:/run/m.sock"),
            ("unix:/run/m.sock:/v1/", "localhost", "/v1", "unix:/run/m.sock:/v1"),
        ] {
            let url = parse(text).unwrap();
            assert_eq!((url.authority.as_str(), url.path.as_str()), (authority, path), "{text}");
            assert_eq!(url.to_string(), shown);
            assert_eq!(parse(shown), Ok(url));
        }
    }

    #[test]
    fn bad_urls_say_what_is_wrong() {
        for (text, part) in [
            ("", "not a URL"),
            ("api.openai.com/v1", "not a URL"),
            ("ftp://x/", "scheme \"ftp\""),
            ("HTTPS://x/", "scheme \"HTTPS\""),
            ("https://", "no host"),
            ("https:///v1", "no host"),
            ("https://user:hunter2@x/v1", "user or password"),
            ("https://x/v1?key=1", "query"),
            ("https://x?key=1", "query"),
            ("https://x/v1#a", "fragment"),
            ("https://x/v 1", "white space"),
            ("https://x/é", "non-ASCII"),
            ("https://x:0/", "port"),
            ("https://x:/", "port"),
            ("https://x:+1/", "port"),
            ("https://x:65536/", "port"),
            ("https://[::1/", "bracket"),
            ("https://[zz]/", "IPv6"),
            ("https://a..b/", "host name"),
            ("https://a%2eb/", "host name"),
            ("https://x/a/../b", "segment"),
            ("https://x/v1/chat/completions", "leave out"),
            ("unix:run/x.sock", "whole path"),
            ("unix:", "whole path"),
        ] {
            let why = parse(text).unwrap_err();
            assert!(why.contains(part), "{text}: {why}");
            assert!(!why.contains("hunter2"));
        }
        assert!(parse(&format!("unix:/{}", "x".repeat(107))).unwrap_err().contains("107"));
    }

    #[test]
    fn metadata_is_refused_in_every_disguise() {
        for host in [
            "169.254.169.254",
            "169.254.0.1",
            "metadata.google.internal",
            "METADATA.google.internal.",
            "[fd00:ec2::254]",
            "[fe80::1]",
            "[::ffff:169.254.169.254]",
            "[64:ff9b::a9fe:a9fe]",
            "100.100.100.200",
            "2852039166",
            "0xa9fea9fe",
            "169.254.43518",
            "0251.0376.0251.0376",
        ] {
            assert!(parse(&format!("http://{host}/v1")).is_err(), "{host}");
        }
        for host in ["10.0.0.1", "127.0.0.1", "192.168.1.1", "[fd00::1]", "gpu1", "x.internal"] {
            assert!(parse(&format!("http://{host}/v1")).is_ok(), "{host}");
        }
    }

    #[test]
    fn only_plain_http_to_elsewhere_is_exposed() {
        for (text, is_exposed) in [
            ("http://10.0.0.1", true),
            ("http://gpu1", true),
            ("http://localhost", false),
            ("http://[::1]", false),
            ("https://x", false),
            ("unix:/x", false),
        ] {
            assert_eq!(parse(text).unwrap().is_exposed(), is_exposed, "{text}");
        }
    }
}
