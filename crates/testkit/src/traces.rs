//! What a secret looks like where it has leaked.

/// RFC 4648, 4, padded.
#[must_use]
pub fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let all = byte(0) << 16 | byte(1) << 8 | byte(2);
        for (at, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            text.push(if at > three.len() { '=' } else { char::from(LETTERS[(all >> shift & 63) as usize]) });
        }
    }
    text
}

/// Texts of which one stands wherever a secret of 24 characters or more has leaked: its first and last twelve, as they are
/// and percent-encoded, and in base64, plain or for URLs, wherever it begins there.
#[must_use]
pub fn traces_of(secret: &str) -> Vec<String> {
    let encode = |byte: u8| if byte.is_ascii_alphanumeric() { char::from(byte).into() } else { format!("%{byte:02X}") };
    let every = |byte: u8| format!("%{byte:02X}");
    let (first, last) = (&secret[..12], &secret[secret.len() - 12..]);
    let mut traces = vec![first.to_owned(), last.to_owned()];
    for part in [first, last] {
        traces.push(part.bytes().map(encode).collect());
        traces.push(part.bytes().map(every).collect());
        traces.push(part.bytes().map(every).collect::<String>().to_lowercase());
    }
    for before in 0..3 {
        let text = base64(&[&vec![0; before], secret.as_bytes()].concat());
        // The first characters have a part of what stands before, the last of what follows.
        let core = text.trim_end_matches('=');
        let core = &core[if before == 0 { 0 } else { before + 1 }..core.len() - 1];
        traces.push(core[..14].to_owned());
        traces.push(core[..14].replace('+', "-").replace('/', "_"));
    }
    traces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leak_is_seen_in_every_coat() {
        assert_eq!((base64(b"fo"), base64(b"foo"), base64(b"foob")), ("Zm8=".into(), "Zm9v".into(), "Zm9vYg==".into()));
        let secret = "cnry/UP+7f3a9d2e5b8c1046";
        let seen = |text: &str| traces_of(secret).iter().any(|trace| text.contains(trace.as_str()));
        for before in ["", "a", "ab", "abc"] {
            assert!(seen(&base64(format!("{before}{secret}...").as_bytes())), "{before}");
        }
        assert!(seen("GET /?key=cnry%2FUP%2B7f3a9&x") && seen("***9d2e5b8c1046") && !seen("nothing of it"));
    }
}
