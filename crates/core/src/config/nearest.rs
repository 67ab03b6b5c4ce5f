//! The known name that a mistyped one was most likely meant to be.

/// Longer names are not compared: nobody mistypes those, and the comparison takes the product of both lengths.
const NAME_CHARS_MAX: usize = 128;

/// The candidate nearest to `name`: at most two edits away, or a third of the length of `name` if that is more; a
/// candidate that is the first word of `name` (`body` for `body_bytes`) or the other way round counts as near too.
#[must_use]
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let name: Vec<char> = name.chars().flat_map(char::to_lowercase).take(NAME_CHARS_MAX + 1).collect();
    if name.len() > NAME_CHARS_MAX {
        return None;
    }
    let limit = (name.len() / 3).max(2);
    let mut best: Option<(usize, &'a str)> = None;
    for candidate in known {
        let other: Vec<char> = candidate.chars().flat_map(char::to_lowercase).collect();
        let Some(edits) = near(&name, &other, limit) else { continue };
        if best.is_none_or(|(least, _)| edits < least) {
            best = Some((edits, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// Edits between the two if that is near; a name of which nothing is left is not.
fn near(name: &[char], other: &[char], limit: usize) -> Option<usize> {
    let edits = distance(name, other);
    if edits <= limit && edits < name.len().max(other.len()) && edits < name.len().min(other.len()).max(2) {
        return Some(edits);
    }
    (is_first_word(name, other) || is_first_word(other, name)).then_some(edits)
}

fn is_first_word(long: &[char], short: &[char]) -> bool {
    long.strip_prefix(short).is_some_and(|rest| matches!(rest.first(), Some('_' | '-')))
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    let cell = |row: &[usize], at: usize| row.get(at).copied().unwrap_or(usize::MAX / 2);
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let replaced = cell(&last, j) + usize::from(x != y);
            let mut least = replaced.min(cell(&last, j + 1) + 1).min(cell(&row, j) + 1);
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(y) && b.get(j - 1) == Some(x);
            if swapped {
                least = least.min(cell(&before, j - 1) + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut last, row);
    }
    cell(&last, b.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [&str; 8] = ["timeout", "min", "max", "slots", "body", "upstreams", "hang_timeout", "tls"];

    #[test]
    fn typing_errors_find_what_was_meant() {
        for (typed, meant) in [
            ("time_out", "timeout"),
            ("timout", "timeout"),
            ("mni", "min"),
            ("Slots", "slots"),
            ("slot", "slots"),
            ("upstream", "upstreams"),
            ("upsteams", "upstreams"),
            ("hang-timeout", "hang_timeout"),
            ("body_bytes", "body"),
        ] {
            assert_eq!(nearest(typed, KNOWN), Some(meant), "{typed}");
        }
    }

    #[test]
    fn nothing_near_is_no_guess() {
        for typed in ["", "q", "zz", "colour", "maximum", "completely_different", &"x".repeat(500)] {
            assert_eq!(nearest(typed, KNOWN), None, "{typed}");
        }
    }

    #[test]
    fn distance_counts_a_swap_once() {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        for (a, b, edits) in [("", "", 0), ("a", "", 1), ("abc", "acb", 1), ("kitten", "sitting", 3), ("ab", "ba", 1)] {
            assert_eq!(distance(&chars(a), &chars(b)), edits, "{a} {b}");
            assert_eq!(distance(&chars(b), &chars(a)), edits, "{b} {a}");
        }
    }
}
