//! The head of an answer: parsed by `httparse`, judged here.

use std::mem::MaybeUninit;

use bytes::Bytes;
use evergate_core::head::complete;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{HeaderName as Name, StatusCode};

use super::Broken;

/// Most bytes of a head, its interim ones each by itself.
pub(super) const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Most fields of a head.
pub(super) const FIELDS_MAX: usize = 100;

/// Beginnings of the names of fields that are passed on, or tell of a refusal; all others end here.
const WANTED: [&str; 3] = ["x-", "openai-", "retry-after"];

/// What an answer says it is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// `application/json`.
    Json,
    /// `text/event-stream`.
    Events,
    /// Anything else, or nothing.
    #[default]
    Other,
}

impl Kind {
    /// Of a media type, with parameters or without.
    fn of(media_type: &[u8]) -> Self {
        let is_of = |name: &[u8]| media_type.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name));
        if is_of(b"application/json") {
            Self::Json
        } else if is_of(b"text/event-stream") {
            Self::Events
        } else {
            Self::Other
        }
    }
}

/// How the end of an answer is told (RFC 9112, 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
    Close,
}

/// An answer's head.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) kind: Kind,
    /// Whether the content is coded.
    pub(crate) is_coded: bool,
    /// The fields that somebody asks for.
    pub(crate) headers: HeaderMap,
    pub(super) framing: Framing,
    /// Whether the upstream keeps the connection.
    pub(super) is_kept: bool,
}

/// Takes a piece that was read; the final head, once it is there, with what is behind it left in `input`. `begun` holds a
/// head's beginning from one piece to the next, of which `searched` bytes hold no end.
pub(super) fn take(
    piece: &[u8],
    begun: &mut Vec<u8>,
    searched: &mut usize,
    input: &mut Bytes,
) -> Result<Option<Head>, Broken> {
    // Most heads come whole, and need not be kept.
    let joined = if begun.is_empty() {
        None
    } else {
        begun.extend_from_slice(piece);
        Some(std::mem::take(begun))
    };
    let mut rest = joined.as_deref().unwrap_or(piece);
    let mut from = std::mem::take(searched);
    loop {
        if !may_begin(rest) {
            return Err(Broken::NotHttp("what came does not begin as an answer does".into()));
        }
        let length = complete(rest, std::mem::take(&mut from));
        if length.unwrap_or(rest.len()) > HEAD_BYTES_MAX {
            return Err(Broken::TooLarge);
        }
        let Some((head, behind)) = length.and_then(|length| rest.split_at_checked(length)) else {
            let left = rest.len();
            *searched = left;
            *begun = match joined {
                // In place: a head may come byte by byte.
                Some(mut all) => {
                    all.drain(..all.len() - left);
                    all
                }
                None => rest.to_vec(),
            };
            return Ok(None);
        };
        match parse(head)? {
            Some(head) => {
                *input = Bytes::copy_from_slice(behind);
                return Ok(Some(head));
            }
            None => rest = behind,
        }
    }
}

/// Whether these can be the first bytes of a head: who speaks something else may never send the end of one.
fn may_begin(bytes: &[u8]) -> bool {
    const START: &[u8] = b"HTTP/1.";
    let bytes = bytes.trim_ascii_start();
    let seen = bytes.len().min(START.len());
    bytes.get(..seen) == START.get(..seen)
}

/// Parses a whole head; none for an interim one.
fn parse(bytes: &[u8]) -> Result<Option<Head>, Broken> {
    let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut []);
    let parsed =
        httparse::ParserConfig::default().parse_response_with_uninit_headers(&mut response, bytes, &mut fields);
    match parsed {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(Broken::NotHttp("the head is not complete".into())),
        Err(httparse::Error::TooManyHeaders) => return Err(Broken::TooLarge),
        Err(error) => return Err(Broken::NotHttp(error.to_string())),
    }
    let code = response.code.unwrap_or_default();
    let status = StatusCode::from_u16(code).map_err(|error| Broken::NotHttp(error.to_string()))?;
    if status.is_informational() {
        // Nobody has asked for another protocol.
        let is_switch = status == StatusCode::SWITCHING_PROTOCOLS;
        return if is_switch { Err(Broken::NotHttp("the protocol was switched".into())) } else { Ok(None) };
    }
    let mut seen = Seen { is_kept: response.version == Some(1), ..Seen::default() };
    let mut headers = HeaderMap::new();
    for field in response.headers.iter() {
        seen.take(field)?;
        if is_wanted(field.name) {
            let name = HeaderName::from_bytes(field.name.as_bytes());
            let name = name.map_err(|error| Broken::NotHttp(error.to_string()))?;
            let value = HeaderValue::from_bytes(field.value);
            headers.append(name, value.map_err(|error| Broken::NotHttp(error.to_string()))?);
        }
    }
    let has_body = !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let framing = if has_body { seen.framing()? } else { Framing::Length(0) };
    let Seen { kind, is_coded, is_kept, .. } = seen;
    Ok(Some(Head { status, kind, is_coded, headers, framing, is_kept }))
}

fn is_wanted(name: &str) -> bool {
    let begins = |with: &str| name.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with));
    WANTED.into_iter().any(begins)
}

/// What the fields say of the connection.
#[derive(Debug, Default)]
struct Seen {
    kind: Kind,
    is_coded: bool,
    length: Option<u64>,
    is_chunked: bool,
    is_kept: bool,
}

impl Seen {
    /// RFC 9112, 6.3 and 9.3. Two readers could see two ends of an answer with two lengths, or with a length and a coding; what
    /// follows on such a connection is somebody's choice.
    fn take(&mut self, field: &httparse::Header<'_>) -> Result<(), Broken> {
        let is = |name: Name| field.name.eq_ignore_ascii_case(name.as_str());
        match field.name.len() {
            10 if is(http::header::CONNECTION) => {
                let mut words = field.value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                self.is_kept &= !words.any(|word| word.eq_ignore_ascii_case(b"close"));
            }
            14 if is(http::header::CONTENT_LENGTH) => {
                let number = std::str::from_utf8(field.value).ok().filter(|text| is_number(text));
                let number = number.and_then(|text| text.parse().ok());
                let number = number.ok_or_else(|| Broken::NotHttp("the length is not a number".into()))?;
                if self.length.replace(number).is_some() {
                    return Err(Broken::FramedTwice);
                }
            }
            17 if is(http::header::TRANSFER_ENCODING) => {
                if self.is_chunked || !field.value.eq_ignore_ascii_case(b"chunked") {
                    return Err(Broken::FramedTwice);
                }
                self.is_chunked = true;
            }
            12 if is(http::header::CONTENT_TYPE) => self.kind = Kind::of(field.value),
            16 if is(http::header::CONTENT_ENCODING) => self.is_coded |= field.value != b"identity",
            _ => {}
        }
        Ok(())
    }

    fn framing(&self) -> Result<Framing, Broken> {
        match (self.length, self.is_chunked) {
            (Some(_), true) => Err(Broken::FramedTwice),
            (None, true) => Ok(Framing::Chunked),
            (Some(bytes), false) => Ok(Framing::Length(bytes)),
            (None, false) => Ok(Framing::Close),
        }
    }
}

/// Digits only: `parse` takes a sign, too.
fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes the text in two pieces, cut at each place, and gives what was found if it was always the same.
    fn each_split(text: &str) -> Result<(Head, Bytes), String> {
        let found = |split: usize| {
            let (mut begun, mut searched, mut input) = (Vec::new(), 0, Bytes::new());
            let (front, back) = text.as_bytes().split_at(split);
            for (piece, behind) in [(front, back), (back, &b""[..])] {
                if piece.is_empty() {
                    continue;
                }
                if let Some(head) = take(piece, &mut begun, &mut searched, &mut input).map_err(|why| why.to_string())? {
                    return Ok((head, [&input, behind].concat().into()));
                }
            }
            Err("no head".to_owned())
        };
        let whole = found(0);
        for split in 1..text.len() {
            assert_eq!(format!("{:?}", found(split)), format!("{whole:?}"), "{split} of {text:?}");
        }
        whole
    }

    #[test]
    fn heads_are_found_wherever_they_are_cut() {
        let (head, behind) = each_split(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\nDate: today\r\n\
             Content-Type: application/json\r\ncontent-length: 5\r\nX-RateLimit-Left: 3\r\n\r\nhello",
        )
        .unwrap();
        assert_eq!((head.status.as_u16(), head.framing, head.is_kept), (200, Framing::Length(5), true));
        let names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!((names.as_slice(), head.kind), (["x-ratelimit-left"].as_slice(), Kind::Json));
        assert_eq!(behind, "hello");
    }

    #[test]
    fn the_framing_is_as_the_fields_say() {
        let framing =
            |fields: &str| each_split(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).map(|(head, _)| head.framing);
        assert_eq!(framing("content-length: 0\r\n"), Ok(Framing::Length(0)));
        assert_eq!(framing("Transfer-Encoding: Chunked\r\n"), Ok(Framing::Chunked));
        assert_eq!(framing(""), Ok(Framing::Close));
        for twice in [
            "content-length: 1\r\ncontent-length: 1\r\n",
            "content-length: 1\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "transfer-encoding: gzip\r\n",
        ] {
            assert_eq!(framing(twice), Err(Broken::FramedTwice.to_string()), "{twice}");
        }
        for bad in ["+1", "-1", "", "1,1", "0x1", "99999999999999999999"] {
            let said = framing(&format!("content-length: {bad}\r\n"));
            assert_eq!(said, Err("the length is not a number".into()), "{bad}");
        }
        let (none, _) = each_split("HTTP/1.1 204 No Content\r\ncontent-length: 7\r\n\r\n").unwrap();
        assert_eq!(none.framing, Framing::Length(0));
    }

    #[test]
    fn a_connection_is_kept_unless_somebody_is_against_it() {
        let kept = |text: &str| each_split(&format!("{text}content-length: 0\r\n\r\n")).unwrap().0.is_kept;
        assert!(kept("HTTP/1.1 200 OK\r\n"));
        assert!(kept("HTTP/1.1 200 OK\r\nconnection: keep-alive\r\n"));
        assert!(!kept("HTTP/1.1 200 OK\r\nConnection: foo, Close\r\n"));
        assert!(!kept("HTTP/1.0 200 OK\r\n"));
    }

    #[test]
    fn what_is_no_head_is_refused_with_its_reason() {
        let many: String = (0..=FIELDS_MAX).map(|number| format!("a{number}: b\r\n")).collect();
        for (text, why) in [
            ("HTTP/1.1 101 Switching Protocols\r\n\r\n".to_owned(), "switched"),
            ("HTTP/2.0 200 OK\r\n\r\n".to_owned(), "begin"),
            ("HTTP/1.1 20 OK\r\n\r\n".to_owned(), "status"),
            ("SSH-2.0-OpenSSH\r\n\r\n".to_owned(), "begin"),
            ("HTTP/1.1 200 OK\r\na b: c\r\n\r\n".to_owned(), "name"),
            ("HTTP/1.1 200 OK\r\na: b\r\n c\r\n\r\n".to_owned(), "header"),
            (format!("HTTP/1.1 200 OK\r\n{many}\r\n"), "100 fields"),
        ] {
            let said = each_split(&text).unwrap_err();
            assert!(said.contains(why), "{text:?}: {said}");
        }
        let greeting = take(b"SSH-2.0-OpenSSH\r\n", &mut Vec::new(), &mut 0, &mut Bytes::new());
        assert!(greeting.unwrap_err().to_string().contains("does not begin"));
        let long = format!("HTTP/1.1 200 OK\r\na: {}", "b".repeat(HEAD_BYTES_MAX));
        let said = take(long.as_bytes(), &mut Vec::new(), &mut 0, &mut Bytes::new()).unwrap_err().to_string();
        assert!(said.contains("more than 65536 bytes"), "{said}");
    }
}
