//! What JSON weighs while it is a tree.

use minijinja::Value;
use serde_json::Value as Json;

/// A member of an object, which takes more than an element of a list: as JSON, with its hash, and
/// as a template's value.
const SLOT: usize = size_of::<(usize, String, Json)>() + size_of::<(usize, Value, Value)>();
/// What a container makes room for with its first member, in both forms: four of them, an index
/// by hash, and what allocators add.
const CONTAINER: usize = 4 * SLOT + 256;
/// Room grows by doubling: of each slot the next one may be empty.
const NEXT: usize = 2 * SLOT;

/// Bytes that a JSON text takes at most as a tree and as a template's value together. A text of
/// braces and commas grows more than a hundredfold.
///
/// `in_strings`: its strings may be JSON, too, which is read: arguments of calls.
#[must_use]
pub fn tree_bytes(json: &str, in_strings: bool) -> usize {
    if json.is_empty() {
        return 0;
    }
    let (mut within, mut escaped) = (false, false);
    let mut bytes = json.len() * 2 + SLOT;
    for byte in json.bytes() {
        if within && escaped {
            escaped = false;
            continue;
        }
        match byte {
            b'\\' if within => escaped = true,
            b'"' => within = !within,
            _ if within && !in_strings => {}
            b'{' | b'[' => bytes += CONTAINER,
            b',' => bytes += NEXT,
            _ => {}
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// At least what a tree has allocated.
    fn allocated(value: &Json) -> usize {
        match value {
            Json::Array(all) => {
                let own = all.capacity() * size_of::<Json>();
                own + all.iter().map(allocated).sum::<usize>()
            }
            Json::Object(all) => {
                let own = all.len() * size_of::<(usize, String, Json)>();
                let of = |(key, value): (&String, &Json)| key.capacity() + allocated(value);
                own + all.iter().map(of).sum::<usize>()
            }
            Json::String(text) => text.capacity(),
            _ => 0,
        }
    }

    #[test]
    fn no_tree_takes_more_than_its_weight() {
        let many = |one: &str| format!("[{}]", vec![one; 10_000].join(","));
        for text in [
            "{}".to_owned(),
            many("1"),
            many("[]"),
            many("[0]"),
            many("{}"),
            many(r#"{"":0}"#),
            many(r#"{"a":[{"b":1}]}"#),
            many(r#""\",{[""#),
            many(r#""a longer text, with what looks like JSON: {\"a\": [1]}""#),
            format!(
                "{{{}}}",
                (0..10_000)
                    .map(|n| format!("\"{n}\":{n}"))
                    .collect::<Vec<_>>()
                    .join(",")
            ),
        ] {
            let tree: Json = serde_json::from_str(&text).unwrap();
            let (least, most) = (allocated(&tree), tree_bytes(&text, false));
            assert!(
                least <= most,
                "{least} over {most}: {}",
                &text[..40.min(text.len())]
            );
        }
    }

    #[test]
    fn a_text_of_small_values_weighs_many_times_its_bytes_and_prose_does_not() {
        let small = format!("[{}]", vec!["[0]"; 100_000].join(","));
        assert!(tree_bytes(&small, false) > 100 * small.len());
        let prose = format!(
            "{{\"a\": \"{}\"}}",
            "some words, and [more]; ".repeat(10_000)
        );
        assert!(tree_bytes(&prose, false) < 3 * prose.len());
        // As the arguments of a call it may be JSON.
        assert!(tree_bytes(&prose, true) > 10 * prose.len());
    }
}
