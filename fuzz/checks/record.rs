//! An access record: one line of JSON that fits a pipe's write, whatever its fields hold.

use evergate_core::record::{Access, LINE_BYTES_MAX, Step};
use serde_json::Value;

/// Fields are cut from the bytes, at every zero.
pub fn check(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let mut parts = text.split('\0').chain(std::iter::repeat(""));
    let mut part = || parts.next().unwrap_or_default();
    let number = bytes.iter().fold(0_u64, |number, byte| number.rotate_left(7) ^ u64::from(*byte));
    let ms = f64::from_bits(number);
    let fields: [&str; 9] = std::array::from_fn(|_| part());
    let path: Vec<Step> =
        (0..number % 9).map(|_| Step { upstream: part().to_owned(), cause: "upstream_bad_response", ms }).collect();
    let access = Access {
        at_ms: number,
        request_id: fields[0],
        client_id: fields[1],
        tenant: fields[2],
        method: fields[3],
        route: fields[4],
        model: fields[5],
        backend: fields[6],
        attempts: number as u32,
        path: &path,
        status: number as u16,
        cause: fields[7],
        is_stream: number.is_multiple_of(2),
        bytes_in: number,
        bytes_out: u64::MAX,
        first_byte_ms: number.is_multiple_of(3).then_some(ms),
        duration_ms: -ms,
        tokens_in: Some(number),
        tokens_out: None,
        is_usage_suspect: number.is_multiple_of(7),
        detail: fields[8],
        pid: number as i32,
        is_by_master: number.is_multiple_of(5),
    };
    let mut out = "before".to_owned();
    access.write_line(&mut out);
    let line = out.strip_prefix("before").expect("what was there stays");
    assert!(line.len() <= LINE_BYTES_MAX, "{} bytes", line.len());
    assert!(line.ends_with('\n') && line.matches('\n').count() == 1);
    let read: Value = serde_json::from_str(line).expect("a record is JSON");
    assert_eq!(read["status"], access.status);
    assert!(fields[0].starts_with(read["request_id"].as_str().expect("a request id")));
}
