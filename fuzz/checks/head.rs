//! A request head and the chunks behind it, against hyper's parser and a plain decoder.

use evergate_core::chunked::Chunks;
use evergate_core::head::{self, Framing, HeadLimits};

const LIMITS: HeadLimits = HeadLimits { bytes: 32 * 1024, fields: 100, uri_bytes: 8 * 1024 };

/// The bytes are what a client sends first.
pub fn check(bytes: &[u8]) {
    let whole = head::complete(bytes, 0);
    if bytes.len() < 2048 {
        assert_eq!(in_pieces(bytes), whole, "another end when it comes byte by byte");
    }
    let Some(length) = whole else { return };
    let (head, body) = bytes.split_at(length);
    let mut fields = Vec::new();
    let Ok(read) = head::read(head, &LIMITS, |name, value| fields.push((name, value))) else { return };
    agrees(head, &read, &fields);
    if read.framing == Framing::Chunked {
        chunks(body);
    }
}

fn in_pieces(bytes: &[u8]) -> Option<usize> {
    let mut searched = 0;
    for end in 0..=bytes.len() {
        if let Some(length) = head::complete(&bytes[..end], searched) {
            return Some(length);
        }
        searched = end;
    }
    None
}

/// What is let through, hyper's parser takes too, and sees the same; and the types for it take what is seen.
fn agrees(head: &[u8], read: &head::Head<'_>, ours: &[(&[u8], &[u8])]) {
    let mut fields = [httparse::EMPTY_HEADER; 100];
    let mut request = httparse::Request::new(&mut fields);
    let parsed = request.parse(head).expect("let through, but hyper's parser refuses it");
    assert_eq!(parsed, httparse::Status::Complete(head.len()));
    let (method, target) = (request.method.unwrap(), request.path.unwrap());
    assert_eq!((read.method, read.target), (method.as_bytes(), target.as_bytes()));
    assert_eq!(read.is_http_1_0, request.version == Some(0));
    target.parse::<http::Uri>().expect("a target that its type refuses");
    http::Method::from_bytes(method.as_bytes()).expect("a method that its type refuses");
    let theirs: Vec<(&[u8], &[u8])> =
        request.headers.iter().map(|field| (field.name.as_bytes(), field.value)).collect();
    assert_eq!(ours, theirs, "other fields");
    for (name, value) in ours {
        http::HeaderName::from_bytes(name).expect("a field name that its type refuses");
        http::HeaderValue::from_bytes(value).expect("a field value that its type refuses");
    }
    let named = |name: &str| -> Vec<&[u8]> {
        let fields = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
        fields.map(|field| field.value).collect()
    };
    let (hosts, lengths, codings) = (named("host"), named("content-length"), named("transfer-encoding"));
    assert!(hosts.len() <= 1 && (hosts.len() == 1 || request.version == Some(0)), "{hosts:?}");
    match read.framing {
        Framing::Chunked => {
            assert!(lengths.is_empty() && codings.len() == 1 && request.version == Some(1));
            assert!(codings[0].eq_ignore_ascii_case(b"chunked"), "{codings:?}");
        }
        Framing::Length(length) => {
            assert!(codings.is_empty() && lengths.len() <= 1);
            let said = lengths.first().map_or(0, |value| std::str::from_utf8(value).unwrap().parse::<u64>().unwrap());
            assert_eq!(said, length);
        }
    }
}

/// However the chunks come, they end where a plain decoder sees their end.
fn chunks(body: &[u8]) {
    let whole = Chunks::default().take(body).map_err(|error| error.fault);
    for step in [1, 2, 3, 7, 64] {
        assert_eq!(chunks_by(body, step), whole, "another end in pieces of {step}");
    }
    if let Ok((length, true)) = whole {
        assert_eq!(decoded(body), Some(length), "another end by the plain decoder");
    }
}

fn chunks_by(body: &[u8], step: usize) -> Result<(usize, bool), evergate_core::Fault> {
    let (mut chunks, mut at) = (Chunks::default(), 0);
    for piece in body.chunks(step) {
        let (taken, is_done) = chunks.take(piece).map_err(|error| error.fault)?;
        at += taken;
        if is_done {
            return Ok((at, true));
        }
        assert_eq!(taken, piece.len(), "bytes of an unfinished body are left");
    }
    Ok((at, false))
}

/// RFC 9112, 7.1, line by line.
fn decoded(body: &[u8]) -> Option<usize> {
    let line_end = |from: usize| body[from..].windows(2).position(|two| two == b"\r\n").map(|at| from + at);
    let mut at = 0;
    loop {
        let end = line_end(at)?;
        let size = body[at..end].split(|byte| matches!(byte, b';' | b' ' | b'\t')).next()?;
        let size = usize::from_str_radix(std::str::from_utf8(size).ok()?, 16).ok()?;
        at = end + 2;
        if size == 0 {
            break;
        }
        if body.get(at + size..at + size + 2)? != b"\r\n" {
            return None;
        }
        at += size + 2;
    }
    loop {
        let end = line_end(at)?;
        let is_last = end == at;
        at = end + 2;
        if is_last {
            return Some(at);
        }
    }
}
