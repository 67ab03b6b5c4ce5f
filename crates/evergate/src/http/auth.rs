//! Who may come in: keys, or, while auth is off, only who is not a web page.

use std::sync::Arc;

use evergate_core::config::{Auth, Sealed};
use evergate_core::{Error, Fault};
use http::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, ORIGIN};
use http::request::Parts;
use subtle::ConstantTimeEq;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The rules of one worker.
#[derive(Debug)]
pub enum Door {
    /// A key is needed: names and values.
    Keys(Keys),
    /// Anybody who reaches the listener, except by way of a browser: host names that are ours.
    Open {
        /// Besides loopback ones.
        hosts: Vec<String>,
    },
}

/// Known keys. They have no `Debug` form.
pub struct Keys(Vec<(Arc<str>, Vec<u8>)>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

impl Door {
    /// The door that a configuration asks for.
    ///
    /// # Errors
    /// When a key's value is missing.
    pub fn new(sealed: &Sealed) -> Result<Self, String> {
        let config = &sealed.config;
        if config.server.auth == Auth::Keys {
            let keys = config.keys.iter().map(|(name, reference)| match sealed.secret(reference) {
                Some(secret) if !secret.is_empty() => Ok((name.as_str().into(), secret.as_bytes().to_vec())),
                _ => Err(format!("the secret {reference} of key {name} was not handed over")),
            });
            return Ok(Self::Keys(Keys(keys.collect::<Result<_, _>>()?)));
        }
        let listening = config.server.listen.iter().filter_map(|text| host_of(text)).map(str::to_ascii_lowercase);
        let named = config.server.hosts.iter().map(|host| host.to_ascii_lowercase());
        Ok(Self::Open { hosts: listening.chain(named).collect() })
    }

    /// Lets a request in and gives the name of its key, empty while auth is off. A page that is `listed` is no stranger.
    ///
    /// # Errors
    /// `invalid_api_key` or `origin_not_allowed`.
    pub fn enter(&self, head: &Parts, is_listed: bool) -> Result<Arc<str>, Error> {
        match self {
            Self::Keys(keys) => keys.find(&head.headers),
            Self::Open { hosts } => {
                let authority = our_host(hosts, head)?;
                if is_listed { Ok(Arc::default()) } else { no_page(authority, head).map(|()| Arc::default()) }
            }
        }
    }
}

impl Keys {
    fn find(&self, headers: &HeaderMap) -> Result<Arc<str>, Error> {
        let missing = || {
            let message = "a key is required: send it as \"Authorization: Bearer KEY\"";
            Error::new(Fault::InvalidApiKey, message)
        };
        let mut values = headers.get_all(AUTHORIZATION).iter();
        let value = values.next().ok_or_else(missing)?.as_bytes();
        let scheme = value.get(..7).ok_or_else(missing)?;
        if values.next().is_some() || !scheme.eq_ignore_ascii_case(b"bearer ") {
            return Err(missing());
        }
        let given = value.get(7..).unwrap_or_default().trim_ascii();
        let mut found = None;
        // Every key is compared, in constant time for its length: how long it takes tells nothing about any of them.
        for (name, key) in &self.0 {
            if bool::from(key.as_slice().ct_eq(given)) {
                found = Some(name);
            }
        }
        found.cloned().ok_or_else(|| Error::new(Fault::InvalidApiKey, "the key is not known here"))
    }
}

/// Whatever a client has sent as its credential, right or wrong, of any scheme.
pub fn credentials(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let values = headers.get_all(AUTHORIZATION).iter();
    values.filter_map(|value| value.as_bytes().rsplit(|byte| *byte == b' ').next())
}

/// The host of `HOST`, `HOST:PORT` or `[V6]:PORT`, without brackets.
fn host_of(authority: &str) -> Option<&str> {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split_once(']').map(|(host, _)| host);
    }
    // By bytes: the search for a character is code that nothing else needs in a request.
    authority.get(..authority.bytes().position(|byte| byte == b':').unwrap_or(authority.len()))
}

fn is_ours(hosts: &[String], host: &str) -> bool {
    // As listened on, which is how most clients ask.
    if hosts.iter().any(|known| known == host) {
        return true;
    }
    let host = host.to_ascii_lowercase();
    let is_loopback = host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || host == "localhost" || host.ends_with(".localhost") || hosts.contains(&host)
}

fn refuse<T>(message: &'static str) -> Result<T, Error> {
    Err(Error::new(Fault::OriginNotAllowed, message))
}

/// The host that is asked, which must be ours: any web page could otherwise spend the operator's money by a name that it
/// makes resolve to a loopback address.
fn our_host<'a>(hosts: &[String], head: &'a Parts) -> Result<Option<&'a str>, Error> {
    let authority = match head.uri.authority() {
        Some(authority) => Some(authority.as_str()),
        None => match head.headers.get(HOST) {
            None => None,
            Some(host) => match host.to_str() {
                Ok(host) => Some(host),
                Err(_) => return refuse("the Host header is not text"),
            },
        },
    };
    if let Some(authority) = authority
        && !host_of(authority).is_some_and(|host| is_ours(hosts, host))
    {
        return refuse("while auth is off, the Host header must be a loopback name; add others to server.hosts");
    }
    Ok(authority)
}

/// Refuses what a web page in somebody's browser can send, by a plain cross-site POST.
fn no_page(authority: Option<&str>, head: &Parts) -> Result<(), Error> {
    for origin in head.headers.get_all(ORIGIN) {
        let own =
            |scheme: &str| authority.is_some_and(|own| origin.as_bytes() == format!("{scheme}://{own}").as_bytes());
        if !own("http") && !own("https") {
            return refuse(
                "while auth is off, requests from web pages of another origin are refused; add it to server.cors",
            );
        }
    }
    if head.headers.get_all(SEC_FETCH_SITE).iter().any(|site| site != "same-origin" && site != "none") {
        return refuse("while auth is off, cross-site requests are refused");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = http::Request::builder().uri("/v1/models");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn keys_are_compared_whole() {
        let keys = Keys(vec![("a".into(), b"secret-a".to_vec()), ("b".into(), b"secret-b".to_vec())]);
        let find = |value: &str| {
            let parts = parts(&[("authorization", value)]);
            keys.find(&parts.headers).map(|name| name.to_string()).map_err(|error| error.fault)
        };
        assert_eq!(find("Bearer secret-b"), Ok("b".into()));
        assert_eq!(find("bearer secret-a"), Ok("a".into()));
        for bad in ["Bearer secret", "Bearer secret-bb", "Bearer ", "Basic secret-a", "secret-a", ""] {
            assert_eq!(find(bad), Err(Fault::InvalidApiKey), "{bad}");
        }
    }

    #[test]
    fn a_web_page_is_refused_while_auth_is_off() {
        let door = Door::Open { hosts: vec!["gateway.lan".into()] };
        let enter = |headers: &[(&str, &str)]| door.enter(&parts(headers), false).is_ok();
        assert!(enter(&[("host", "127.0.0.1:4700")]));
        assert!(enter(&[("host", "[::1]:4700")]));
        assert!(enter(&[("host", "Gateway.LAN:1")]));
        assert!(enter(&[("host", "localhost:4700"), ("origin", "http://localhost:4700")]));
        assert!(!enter(&[("host", "evil.example")]));
        assert!(!enter(&[("host", "127.0.0.1.evil.example")]));
        assert!(!enter(&[("host", "localhost"), ("origin", "https://evil.example")]));
        assert!(!enter(&[("host", "localhost"), ("origin", "null")]));
        assert!(!enter(&[("host", "localhost"), ("sec-fetch-site", "cross-site")]));
        // A page on the list is let in, a name that is not ours stays out.
        let page = [("origin", "https://app.example"), ("sec-fetch-site", "cross-site")];
        assert!(door.enter(&parts(&[&page[..], &[("host", "localhost")]].concat()), true).is_ok());
        assert!(door.enter(&parts(&[&page[..], &[("host", "evil.example")]].concat()), true).is_err());
    }
}
