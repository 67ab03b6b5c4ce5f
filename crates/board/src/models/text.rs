//! Texts: what is called whole is whole, and a writer's death in the middle does not outlast the next text.

use std::sync::Arc;

use super::mortal;
use crate::text::Text;

const TEXTS: [&str; 3] = ["", "no such file: 1111", "permission denied: 22222222"];

fn check(text: &Text) {
    let (is_whole, bytes) = text.read();
    let told = String::from_utf8_lossy(&bytes).into_owned();
    assert!(!is_whole || TEXTS.contains(&told.as_str()), "{told:?} is called whole");
}

/// A writer dies anywhere, and its row gets another one, while somebody reads.
pub(super) fn whole_when_said_so() {
    let text = Arc::new(Text::default());
    let written = Arc::clone(&text);
    let writer = mortal(20, move || TEXTS[1..].iter().for_each(|text| written.set(text)));
    let read = Arc::clone(&text);
    let reader = shuttle::thread::spawn(move || (0..3).for_each(|_| check(&read)));
    writer.join().unwrap();
    check(&text);
    for said in [TEXTS[0], TEXTS[2]] {
        text.set(said);
        assert_eq!(text.get(), said, "its writer came to the end");
    }
    reader.join().unwrap();
}

#[test]
fn a_text_that_is_called_whole_is_one_that_somebody_wrote() {
    super::explore(whole_when_said_so);
}
