//! Labels: one number for a text whoever asks first, and a whole text for whoever has its number.

use super::{board, mortal};
use crate::Board;

/// Of the same length and more than one word, so that a mixture of two would not be noticed by that; both are looked for
/// at the same place first.
const TEXTS: [&str; 2] = ["the-first-of-two-upstreams", "the-other-of-two-upstreams"];

fn ask(board: &Board, texts: &[&str]) -> Vec<u16> {
    let number = |text: &&str| {
        let id = board.label(text);
        assert_eq!(board.label_text(id), **text, "who has a number has its text");
        id
    };
    texts.iter().map(number).collect()
}

/// Three ask for two texts in other orders, one of them dies, and one reads every number all the while.
pub(super) fn one_number_whole_text() {
    let board = board(1);
    let start = |texts: [&'static str; 2]| {
        let board = board.clone();
        move || ask(&board, &texts)
    };
    let [a, b] = TEXTS;
    let dies = mortal(45, {
        let life = start([a, b]);
        move || drop(life())
    });
    let (one, two) = (shuttle::thread::spawn(start([a, b])), shuttle::thread::spawn(start([b, a])));
    let seen = board.clone();
    let reads = shuttle::thread::spawn(move || {
        for id in (0..2).flat_map(|_| 2..8) {
            let text = seen.label_text(id);
            assert!(text.is_empty() || TEXTS.contains(&text.as_str()), "{id} is {text:?}");
        }
    });
    let (mut one, two) = (one.join().unwrap(), two.join().unwrap());
    dies.join().unwrap();
    reads.join().unwrap();
    one.reverse();
    assert_eq!(one, two, "one number for a text");
    assert_ne!(one[0], one[1], "and another for another");
}

#[test]
fn a_text_has_one_number_and_a_number_a_whole_text() {
    super::explore(one_number_whole_text);
}
