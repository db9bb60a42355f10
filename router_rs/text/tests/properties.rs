//! The detokeniser against whole decoding, stop strings against naive search.
#![allow(clippy::unwrap_used)]

use kvmesh_text::{Limits, ModelText, StopMatcher, TextFile, TextSettings};
use proptest::prelude::*;
use std::sync::{LazyLock, atomic::AtomicBool};
use tokenizers::Tokenizer;

struct Case {
    name: &'static str,
    ours: ModelText,
    theirs: Tokenizer,
}

static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
    ["byte_level", "byte_fallback", "metaspace"]
        .into_iter()
        .map(|name| {
            let path = format!("{}/tests/data/{name}.json", env!("CARGO_MANIFEST_DIR"));
            let bytes = std::fs::read(path).unwrap();
            let file = TextFile {
                name: "tokenizer.json".to_owned(),
                bytes: bytes.clone(),
            };
            let ours = ModelText::from_files(&[file], &Limits::default()).unwrap();
            Case {
                name,
                ours,
                theirs: Tokenizer::from_bytes(bytes).unwrap(),
            }
        })
        .collect()
});

fn whole(ours: &ModelText, ids: &[u32], special: bool) -> String {
    let mut detokenizer = ours.detokenizer(special);
    let mut text = String::new();
    for &id in ids {
        detokenizer.push(id, &mut text);
    }
    detokenizer.finish(&mut text);
    text
}

/// The same tokenisers with each end of the work that there is: none, one that only looks at
/// offsets, one that adds tokens.
static ENDS: LazyLock<Vec<(ModelText, Tokenizer)>> = LazyLock::new(|| {
    let offsets = serde_json::json!({"type": "ByteLevel", "add_prefix_space": true,
        "trim_offsets": true, "use_regex": true});
    let mut ends = Vec::new();
    for name in ["byte_level", "byte_fallback", "metaspace"] {
        let path = format!("{}/tests/data/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let read: serde_json::Value =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let adds = read["post_processor"].clone();
        for end in [serde_json::Value::Null, offsets.clone(), adds] {
            let mut json = read.clone();
            json["post_processor"] = end;
            let bytes = json.to_string().into_bytes();
            let theirs = Tokenizer::from_bytes(&bytes).unwrap();
            let name = "tokenizer.json".to_owned();
            let ours = ModelText::from_files(&[TextFile { name, bytes }], &Limits::default());
            ends.push((ours.unwrap(), theirs));
        }
    }
    ends
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Special tokens among it, and those that are added.
    #[test]
    fn ids_of_a_text_are_the_tokenisers_own(
        parts in prop::collection::vec("\\PC{0,12}|<s>|<\\|im_end\\|>|<tool_call>", 0..6),
        special in any::<bool>(),
    ) {
        let text = parts.concat();
        for (ours, theirs) in ENDS.iter() {
            let never = AtomicBool::new(false);
            let ids = match special {
                true => ours.encode(&text, &never),
                false => ours.encode_rendered(&text, &never),
            };
            let theirs = theirs.encode(text.as_str(), special).unwrap();
            prop_assert_eq!(ids.unwrap(), theirs.get_ids());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Any ids, also such that break characters, and ids that do not exist.
    /// A run of byte tokens that is no UTF-8 is the one difference: whole
    /// decoding gives up on all of the run, which cannot be known when its
    /// first character comes.
    #[test]
    fn text_of_any_ids_is_that_of_whole_decoding(
        ids in prop::collection::vec(0u32..440, 0..60),
        special in any::<bool>(),
    ) {
        for case in CASES.iter() {
            let theirs = case.theirs.decode(&ids, !special).unwrap();
            let ours = whole(&case.ours, &ids, special);
            if case.name == "byte_level" || !theirs.contains('\u{fffd}') {
                prop_assert_eq!(&ours, &theirs, "{}", case.name);
            }
        }
    }

    /// What a model writes: real text, cut into ids.
    #[test]
    fn text_comes_back_whole(text in "\\PC{0,40}") {
        for case in CASES.iter() {
            let ids = case.theirs.encode(text.as_str(), false).unwrap().get_ids().to_vec();
            prop_assert_eq!(whole(&case.ours, &ids, true), case.theirs.decode(&ids, false).unwrap());
        }
    }

    /// Text after i ids never changes later: it is a prefix of what follows.
    #[test]
    fn what_came_out_stays(ids in prop::collection::vec(0u32..440, 1..40)) {
        for case in CASES.iter() {
            let mut detokenizer = case.ours.detokenizer(true);
            let (mut text, mut before) = (String::new(), String::new());
            for &id in &ids {
                detokenizer.push(id, &mut text);
                prop_assert!(text.starts_with(&before));
                before.clone_from(&text);
            }
        }
    }
}

/// Where the first stop string ends the text: the one that is complete first,
/// the longest of those.
fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
    for end in 1..=text.len() {
        let ending = |stop: &&String| text.as_bytes()[..end].ends_with(stop.as_bytes());
        if let Some(longest) = stops.iter().filter(ending).map(String::len).max() {
            let index = stops
                .iter()
                .position(|stop| stop.len() == longest && ending(&stop))
                .unwrap();
            let cut = if include { end } else { end - longest };
            return (text[..cut].to_owned(), Some(index));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3_000))]

    /// At every split of the text into two parts, and in single characters.
    #[test]
    fn stop_strings_are_found_wherever_the_text_is_cut(
        text in "[abéß]{0,24}",
        stops in prop::collection::vec("[abéß]{1,5}", 0..5),
        include in any::<bool>(),
    ) {
        let expected = naive(&text, &stops, include);
        let matcher = StopMatcher::new(&stops, include).unwrap();
        let run = |parts: &[&str]| {
            let (mut matcher, mut out, mut hit) = (matcher.clone(), String::new(), None);
            for part in parts {
                let found = matcher.push(part, true, &mut out);
                hit = hit.or(found);
            }
            matcher.finish(&mut out);
            (out, hit)
        };
        for (at, _) in text.char_indices().chain([(text.len(), ' ')]) {
            prop_assert_eq!(run(&[&text[..at], &text[at..]]), expected.clone());
        }
        let single: Vec<String> = text.chars().map(String::from).collect();
        let single: Vec<&str> = single.iter().map(String::as_str).collect();
        prop_assert_eq!(run(&single), expected);
    }

    /// Only a possible beginning of a stop string is ever held back.
    #[test]
    fn nothing_else_is_held_back(text in "[ab]{0,20}", stops in prop::collection::vec("[ab]{1,4}", 1..4)) {
        let mut matcher = StopMatcher::new(&stops, false).unwrap();
        let (mut out, mut seen) = (String::new(), String::new());
        for c in text.chars() {
            seen.push(c);
            if matcher.push(&c.to_string(), true, &mut out).is_some() {
                break;
            }
            let held = &seen[out.len()..];
            prop_assert_eq!(held.len(), matcher.held_bytes());
            prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
        }
    }

    /// A stop string counts from the token on that reaches min_tokens.
    #[test]
    fn min_tokens_is_kept(
        ids in prop::collection::vec(4u32..420, 0..30),
        min_tokens in 0u32..12,
        letter in "[aeiou ]",
    ) {
        let case = &CASES[0];
        let settings = TextSettings { stops: vec![letter.clone()], min_tokens, ..TextSettings::default() };
        let mut stream = case.ours.stream(&settings).unwrap();
        let mut out = String::new();
        let hit = stream.push(&ids, &mut out);
        let expected = (0..ids.len()).find(|&i| {
            let text = |n: usize| { let mut s = String::new(); let mut d = case.ours.detokenizer(false); for &id in &ids[..n] { d.push(id, &mut s); } s };
            i as u32 + 1 >= min_tokens && text(i + 1)[text(i).len()..].contains(&letter)
        });
        prop_assert_eq!(hit.map(|hit| hit.tokens as usize), expected.map(|i| i + 1));
    }
}

#[test]
fn stop_strings_out_of_bounds_are_refused() {
    let many = vec!["x".to_owned(); 65];
    assert!(StopMatcher::new(&many, false).is_err());
    assert!(StopMatcher::new(&many[..64], false).is_ok());
    assert!(StopMatcher::new(&[String::new()], false).is_err());
    assert!(StopMatcher::new(&["y".repeat(1025)], false).is_err());
    assert!(StopMatcher::new(&["y".repeat(1024)], false).is_ok());
}
