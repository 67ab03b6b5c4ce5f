use proptest::prelude::*;

use super::*;

/// An event without its place: what must not depend on how the bytes arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    data: Option<Vec<u8>>,
    event: Option<Vec<u8>>,
    is_comment: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Run {
    out: Vec<u8>,
    events: Vec<Seen>,
    unfinished: usize,
    is_too_large: bool,
}

fn run<'a>(chunks: impl IntoIterator<Item = &'a [u8]>, bytes_max: usize) -> Run {
    let mut splitter = Splitter::new(bytes_max);
    let mut run = Run { out: Vec::new(), events: Vec::new(), unfinished: 0, is_too_large: false };
    for chunk in chunks {
        let mut raws = Vec::new();
        let pushed = splitter.push(Bytes::copy_from_slice(chunk), &mut |event| {
            raws.push(event.raw.clone());
            run.events.push(Seen {
                data: event.has_data.then(|| event.data.to_vec()),
                event: event.event.map(<[u8]>::to_vec),
                is_comment: event.is_comment,
            });
        });
        let (out, is_end) = match pushed {
            Ok(out) => (out, false),
            Err(large) => (large.completed, true),
        };
        // The ranges tile what is returned, but for the LF of a CR that was returned before.
        let mut at = raws.first().map_or(out.len(), |raw| raw.start);
        assert!(at == 0 || (at == 1 && out[0] == b'\n') || out.is_empty(), "{raws:?}");
        for raw in raws {
            assert_eq!(raw.start, at);
            at = raw.end;
        }
        assert_eq!(at, out.len());
        assert!(splitter.carry.len() <= bytes_max && splitter.carry.capacity() <= 2 * bytes_max.max(64));
        run.out.extend_from_slice(&out);
        if is_end {
            run.is_too_large = true;
            break;
        }
    }
    run.unfinished = splitter.finish();
    run
}

/// The standard's algorithm, line by line over the whole stream; blank lines that dispatch nothing are kept.
fn standard(stream: &[u8]) -> (Vec<Seen>, usize) {
    let (mut events, mut lines, mut line, mut at, mut border) = (Vec::new(), Vec::new(), Vec::new(), 0, 0);
    let marked = stream.starts_with(b"\xef\xbb\xbf");
    // A blank first line behind a mark is one blank line more in the standard than in a splitter, which looks at lines
    // as they are; neither dispatches anything.
    while at < stream.len() {
        let byte = stream[at];
        at += 1;
        if byte != b'\r' && byte != b'\n' {
            line.push(byte);
            continue;
        }
        if byte == b'\r' && stream.get(at) == Some(&b'\n') {
            at += 1;
        }
        let is_end = line.is_empty();
        lines.push(std::mem::take(&mut line));
        if is_end {
            events.push(event_of(&lines, marked && border == 0));
            lines.clear();
            border = at;
        }
    }
    (events, border)
}

fn event_of(lines: &[Vec<u8>], marked: bool) -> Seen {
    let mut seen = Seen { data: None, event: None, is_comment: true };
    for (number, line) in lines.iter().enumerate() {
        let line = if marked && number == 0 { &line[3..] } else { &line[..] };
        if line.is_empty() || line[0] == b':' {
            continue;
        }
        seen.is_comment = false;
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().unwrap();
        let value = parts.next().unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"data" => match &mut seen.data {
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
                None => seen.data = Some(value.to_vec()),
            },
            b"event" => seen.event = (!value.is_empty()).then(|| value.to_vec()),
            _ => {}
        }
    }
    seen
}

fn data(stream: &str) -> Vec<String> {
    let run = run([stream.as_bytes()], 4096);
    run.events.into_iter().filter_map(|event| Some(String::from_utf8(event.data?).unwrap())).collect()
}

#[test]
fn f9_fields_are_read_as_the_standard_says() {
    for (stream, expected) in [
        ("data: a\n\n", vec!["a"]),
        ("data:a\n\n", vec!["a"]),
        ("data:  a \n\n", vec![" a "]),
        ("data: a\ndata\ndata:b\n\n", vec!["a\n\nb"]),
        ("data\n\n", vec![""]),
        ("data: a\r\n\r\ndata: b\r\rdata: c\n\n", vec!["a", "b", "c"]),
        ("data: a\r\ndata: b\rdata: c\n\r\n", vec!["a\nb\nc"]),
        ("\u{feff}data: a\n\n\u{feff}data: b\n\n", vec!["a"]),
        (" data: a\n\nDATA: b\n\ndatax: c\n\n", vec![]),
        ("id: 1\nretry: 5\nevent: e\ndata: a:b\n: note\n\n", vec!["a:b"]),
        ("\n\n\ndata: a\n\n\n\n", vec!["a"]),
        ("data: a\n", vec![]),
    ] {
        assert_eq!(data(stream), expected, "{stream:?}");
    }
}

#[test]
fn comments_types_and_the_end_mark_are_told_apart() {
    let mut seen = Vec::new();
    let stream = ": ping\n\nevent: error\ndata: {}\n\nevent:\ndata: x\n\ndata:  [DONE] \n\nid: 7\n\n";
    let out = Splitter::new(100)
        .push(Bytes::from(stream), &mut |event| {
            seen.push((event.is_comment, event.has_data, event.event.map(<[u8]>::to_vec), event.is_done()));
            assert!(matches!(event.data, Cow::Borrowed(_)));
        })
        .unwrap();
    assert_eq!(out, stream);
    assert_eq!(
        seen,
        [
            (true, false, None, false),
            (false, true, Some(b"error".to_vec()), false),
            (false, true, None, false),
            (false, true, None, true),
            (false, false, None, false),
        ]
    );
}

#[test]
fn whole_events_are_not_copied() {
    let mut splitter = Splitter::new(100);
    let chunk = Bytes::from_static(b"data: a\n\ndata: b\n\n");
    let out = splitter.push(chunk.clone(), &mut |_| {}).unwrap();
    assert_eq!((out.as_ptr(), out.len()), (chunk.as_ptr(), chunk.len()));
    let chunk = Bytes::from_static(b"data: c\n\ndata: d");
    let out = splitter.push(chunk.clone(), &mut |_| {}).unwrap();
    assert_eq!((out.as_ptr(), out.len()), (chunk.as_ptr(), 9));
    assert_eq!(splitter.finish(), 7);
    assert_eq!(splitter.push(Bytes::from_static(b"\n\ndata: e\n\nda"), &mut |_| {}).unwrap(), "data: d\n\ndata: e\n\n");
    assert_eq!(splitter.finish(), 2);
}

#[test]
fn a_cr_completes_at_once_and_its_late_lf_is_no_event() {
    let mut splitter = Splitter::new(100);
    let mut count = 0;
    let mut push = |chunk: &'static str| {
        let out = splitter.push(Bytes::from(chunk), &mut |_| count += 1).unwrap();
        (out, count)
    };
    assert_eq!(push("data: a\r\n\r"), (Bytes::from("data: a\r\n\r"), 1));
    assert_eq!(push(""), (Bytes::new(), 1));
    assert_eq!(push("\n"), (Bytes::from("\n"), 1));
    assert_eq!(push("\n"), (Bytes::from("\n"), 2));
    assert_eq!(push("data: b\r"), (Bytes::new(), 2));
    assert_eq!(push("\ndata: c\r\r"), (Bytes::from("data: b\r\ndata: c\r\r"), 3));
    assert_eq!(push("\ndata: d\n\nx"), (Bytes::from("\ndata: d\n\n"), 4));
    assert_eq!(splitter.finish(), 1);
}

#[test]
fn f10_an_event_over_the_limit_ends_the_stream() {
    // 10 bytes are allowed: "data: ab\n\n".
    let mut splitter = Splitter::new(10);
    assert_eq!(splitter.push(Bytes::from("data: ab\n\n"), &mut |_| {}).unwrap().len(), 10);
    let large = splitter.push(Bytes::from("data: a\n\ndata: abc\n\n"), &mut |_| {}).unwrap_err();
    assert_eq!(large, TooLarge { bytes_max: 10, completed: Bytes::from("data: a\n\n") });
    let again = splitter.push(Bytes::from("data: a\n\n"), &mut |_| panic!("the stream is over")).unwrap_err();
    assert!(again.completed.is_empty() && splitter.finish() == 0);
    // Without any line end, in pieces.
    let mut splitter = Splitter::new(1000);
    let refused = (0..1000).find(|_| splitter.push(Bytes::from("0123456789"), &mut |_| {}).is_err());
    assert_eq!(refused, Some(100));
}

#[test]
fn f11_a_million_tiny_events_are_counted() {
    let stream = Bytes::from("data:\n\n".repeat(1_000_000));
    let mut count = 0;
    let mut splitter = Splitter::new(64);
    // Off the border by one, so that something is carried as well.
    let out = splitter.push(stream.slice(..1), &mut |_| count += 1).unwrap();
    let rest = splitter.push(stream.slice(1..), &mut |_| count += 1).unwrap();
    assert_eq!((out.len(), rest.len(), count), (0, stream.len(), 1_000_000));
}

#[test]
fn f7_f8_every_split_of_a_stream_says_the_same() {
    let stream =
        "\u{feff}: hi\r\n\r\ndata: {\"a\":\"😀\"}\r\rdata: é\ndata: ü\r\n\n\nevent: x\rdata: [DONE]\r\n\r\nrest😀";
    let bytes = stream.as_bytes();
    let whole = run([bytes], 100);
    assert_eq!(whole.unfinished, 8);
    assert_eq!(whole.out, &bytes[..bytes.len() - 8]);
    for first in 0..=bytes.len() {
        for second in first..=bytes.len() {
            let chunks = [&bytes[..first], &bytes[first..second], &bytes[second..]];
            assert_eq!(run(chunks, 100), whole, "{first} {second}");
        }
    }
    assert_eq!(run(bytes.chunks(1), 100), whole);
}

fn streams() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop::sample::select(
        &[
            "\n",
            "\n",
            "\r",
            "\r\n",
            "\r\n\r\n",
            "\n\n",
            "data: x",
            "data:",
            "data",
            ":",
            ": note",
            "event: e",
            "event:",
            "id: 1",
            "retry",
            "😀",
            "é",
            "[DONE]",
            " ",
            "\u{feff}",
            "{\"a\":1}",
            "\0",
        ][..],
    );
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat().into_bytes())
}

fn split<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).chain([0, stream.len()]).collect();
    cuts.sort_unstable();
    cuts.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect()
}

proptest! {
    #[test]
    fn a_stream_is_read_as_the_standard_does(stream in streams()) {
        let whole = run([&stream[..]], 4096);
        let (events, border) = standard(&stream);
        prop_assert_eq!(whole.events, events);
        prop_assert_eq!(&whole.out[..], &stream[..border]);
        prop_assert_eq!(whole.unfinished, stream.len() - border);
    }

    #[test]
    fn the_split_does_not_matter(
        stream in streams(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        bytes_max in 1..120_usize,
    ) {
        let whole = run([&stream[..]], bytes_max);
        for chunks in [split(&stream, &cuts), stream.chunks(1).collect()] {
            prop_assert_eq!(&run(chunks.iter().copied(), bytes_max), &whole);
            // Nothing that is complete waits for the next chunk.
            let (mut fed, mut splitter, mut out) = (0, Splitter::new(4096), 0);
            for chunk in chunks {
                fed += chunk.len();
                out += splitter.push(Bytes::copy_from_slice(chunk), &mut |_| {}).unwrap().len();
                prop_assert_eq!(out, standard(&stream[..fed]).1);
            }
        }
    }
}
