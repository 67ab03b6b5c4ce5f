//! Plain words for a TLS handshake that failed: what is wrong with the upstream's certificate, and what to do.

use std::io;

use rustls::pki_types::UnixTime;
use rustls::{CertificateError, Error, InvalidMessage};

/// Names of a certificate that are told; it may have hundreds.
const NAMES_MAX: usize = 3;
/// Of each so many characters: it is the upstream's to choose.
const NAME_CHARS_MAX: usize = 80;

/// A kind that can be searched for, and the words behind it.
pub(crate) fn words(error: &io::Error) -> String {
    match error.get_ref().and_then(|error| error.downcast_ref::<Error>()) {
        Some(Error::InvalidCertificate(why)) => {
            let (kind, text) = certificate(why);
            format!("{kind}: {text}")
        }
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
            "handshake: what answers there does not speak TLS; if that is right, base_url begins with http://"
                .to_owned()
        }
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "handshake: the upstream closed the connection in the middle of it".to_owned()
        }
        _ => format!("handshake: {error}"),
    }
}

fn certificate(why: &CertificateError) -> (&'static str, String) {
    match why {
        CertificateError::ExpiredContext { time, not_after } => {
            let past = span(*not_after, *time);
            (
                "expired",
                format!("the upstream's certificate ended {past} ago by this machine's clock; it has to be renewed"),
            )
        }
        CertificateError::NotValidYetContext { time, not_before } => {
            let left = span(*time, *not_before);
            (
                "not_valid_yet",
                format!("the upstream's certificate begins in {left} by this machine's clock; look at that clock"),
            )
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let (asked, has) = (expected.to_str(), names(presented));
            (
                "wrong_name",
                format!("the upstream's certificate is for {has}, not for {asked}; base_url needs a name of it"),
            )
        }
        why => plain(why).map_or_else(|| ("certificate", why.to_string()), |(kind, text)| (kind, text.to_owned())),
    }
}

/// What needs no more than itself to be said.
fn plain(why: &CertificateError) -> Option<(&'static str, &'static str)> {
    Some(match why {
        CertificateError::Expired => ("expired", "the upstream's certificate has ended; it has to be renewed"),
        CertificateError::NotValidYet => {
            ("not_valid_yet", "the upstream's certificate has not begun yet; look at this machine's clock")
        }
        CertificateError::NotValidForName => {
            ("wrong_name", "the upstream's certificate is for another name; base_url needs a name of it")
        }
        CertificateError::UnknownIssuer => (
            "unknown_authority",
            "nobody who is trusted here has signed the upstream's certificate; name the authority that has, or the \
             certificate itself if it is self-signed, as \"roots\" of this upstream, or have the upstream send the whole chain",
        ),
        CertificateError::Revoked => ("revoked", "the upstream's certificate was revoked; the upstream needs another"),
        CertificateError::BadSignature => (
            "bad_signature",
            "the upstream's certificate is not signed with the key of the authority that it names; compare the file of \
             \"roots\" with the authority's certificate of today",
        ),
        CertificateError::BadEncoding => ("certificate", "the upstream's certificate cannot be read: it is damaged"),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => (
            "certificate",
            "the upstream's certificate is not meant for servers (extended key usage); it needs another",
        ),
        CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => (
            "certificate",
            "the upstream's certificate is signed in a way that is not accepted, such as SHA-1; it needs another",
        ),
        CertificateError::Other(other) => return of_the_checker(other.0.downcast_ref()?),
        _ => return None,
    })
}

/// What the library beneath knows only by its own name.
fn of_the_checker(why: &webpki::Error) -> Option<(&'static str, &'static str)> {
    match why {
        // What `openssl req -x509` makes.
        webpki::Error::CaUsedAsEndEntity => Some((
            "ca_certificate",
            "the upstream uses an authority's certificate (CA:TRUE, as many self-signed ones have it) as its own; it needs \
             one with CA:FALSE, and \"roots\" of this upstream names that, or the authority that signed it",
        )),
        webpki::Error::UnsupportedCertVersion => Some((
            "certificate",
            "the upstream's certificate is not of X.509 version 3, so it holds no names; it needs another",
        )),
        _ => None,
    }
}

/// The time between two, in the largest unit of which there are two.
fn span(from: UnixTime, to: UnixTime) -> String {
    let seconds = to.as_secs().saturating_sub(from.as_secs());
    let units = [(86_400, "days"), (3_600, "hours"), (60, "minutes")];
    let unit = units.into_iter().find(|(length, _)| seconds >= 2 * length);
    unit.map_or_else(|| format!("{seconds} seconds"), |(length, name)| format!("{} {name}", seconds / length))
}

/// The library gives names as `DnsName("a.example")` and `IpAddress(127.0.0.1)`.
fn names(presented: &[String]) -> String {
    let bare = |name: &String| {
        let name = name.split_once('(').map_or(&**name, |(_, rest)| rest.trim_end_matches(')')).trim_matches('"');
        name.escape_debug().take(NAME_CHARS_MAX).collect::<String>()
    };
    let told: Vec<String> = presented.iter().take(NAMES_MAX).map(bare).collect();
    match presented.len().saturating_sub(told.len()) {
        _ if told.is_empty() => "no name at all".to_owned(),
        0 => told.join(", "),
        more => format!("{} and {more} more", told.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use rustls::OtherError;
    use rustls::pki_types::ServerName;

    use super::*;

    fn told(why: CertificateError) -> String {
        words(&io::Error::new(io::ErrorKind::InvalidData, Error::InvalidCertificate(why)))
    }

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    fn other(why: webpki::Error) -> CertificateError {
        CertificateError::Other(OtherError(Arc::new(why)))
    }

    #[test]
    fn d7_every_certificate_that_users_meet_has_words_and_none_of_the_librarys() {
        let wrong = |presented: &[&str]| CertificateError::NotValidForNameContext {
            expected: ServerName::try_from("api.example").unwrap(),
            presented: presented.iter().map(|&name| name.to_owned()).collect(),
        };
        let expired = |time, not_after| CertificateError::ExpiredContext { time: at(time), not_after: at(not_after) };
        for (why, kind, part) in [
            (expired(864_000, 0), "expired", "ended 10 days ago"),
            (expired(7_300, 0), "expired", "ended 2 hours ago"),
            (expired(130, 0), "expired", "ended 2 minutes ago"),
            (expired(1, 0), "expired", "ended 1 seconds ago"),
            (CertificateError::Expired, "expired", "renewed"),
            (
                CertificateError::NotValidYetContext { time: at(0), not_before: at(7_200) },
                "not_valid_yet",
                "begins in 2 hours",
            ),
            (
                wrong(&["DnsName(\"a.example\")", "IpAddress(127.0.0.1)"]),
                "wrong_name",
                "for a.example, 127.0.0.1, not for api.example",
            ),
            (wrong(&["DnsName(\"a\")"; 9]), "wrong_name", "for a, a, a and 6 more, not"),
            (wrong(&["DnsName(\"a\u{1b}[2J\")"]), "wrong_name", "for a\\u{1b}[2J, not"),
            (wrong(&[]), "wrong_name", "for no name at all, not"),
            (CertificateError::UnknownIssuer, "unknown_authority", "\"roots\""),
            (CertificateError::Revoked, "revoked", "revoked"),
            (CertificateError::BadSignature, "bad_signature", "\"roots\""),
            (CertificateError::BadEncoding, "certificate", "damaged"),
            (CertificateError::InvalidPurpose, "certificate", "not meant for servers"),
            (other(webpki::Error::CaUsedAsEndEntity), "ca_certificate", "CA:FALSE"),
            (other(webpki::Error::UnsupportedCertVersion), "certificate", "version 3"),
        ] {
            let text = told(why);
            assert!(text.starts_with(&format!("{kind}: the upstream")) || kind == "unknown_authority", "{text}");
            assert!(text.starts_with(&format!("{kind}: ")) && text.contains(part), "{text}");
            assert!(!text.contains("Error") && !text.contains("Context") && !text.contains('\u{1b}'), "{text}");
        }
        // Whatever else there is keeps the library's words.
        assert!(told(other(webpki::Error::BadDer)).starts_with("certificate: "));
    }

    #[test]
    fn a_handshake_that_was_none_is_told_in_words() {
        let plain = Error::InvalidMessage(InvalidMessage::InvalidContentType);
        let text = words(&io::Error::new(io::ErrorKind::InvalidData, plain));
        assert!(text.starts_with("handshake: ") && text.contains("does not speak TLS"), "{text}");
        let text = words(&io::Error::new(io::ErrorKind::UnexpectedEof, "tls handshake eof"));
        assert!(text.starts_with("handshake: the upstream closed"), "{text}");
        assert_eq!(words(&io::Error::other("odd")), "handshake: odd");
    }
}
