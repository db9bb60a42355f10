//! Values that a model wrote as text, as JSON.

use serde::de::IgnoredAny;

use crate::{look::is_space, python, tool::Types};

/// Whether a text is one value of JSON.
pub(crate) fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// Adds a text as the inside of a JSON string. What it adds for two texts is what it adds
/// for both as one.
pub(crate) fn escape(text: &str, out: &mut String) {
    for letter in text.chars() {
        match letter {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{0}'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", u32::from(letter))),
            _ => out.push(letter),
        }
    }
}

/// A text as a JSON string.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    escape(text, &mut out);
    out.push('"');
    out
}

/// A value of one of these types, from text without quotes: what reads as one of them is
/// it, all else is a string, also where none is allowed.
pub(crate) fn typed(text: &str, types: Types) -> String {
    let value = text.trim_matches(|letter: char| u8::try_from(letter).is_ok_and(is_space));
    if let Some(first) = value.bytes().next()
        && is_json(value)
    {
        let kind = Types::of_json(first);
        // Quotes of a string are its own: the format has none.
        let fits = kind != Types::STRING || types == Types::ANY;
        if fits && types.has(kind) {
            return value.to_owned();
        }
    }
    if let Some(read) = python::literal(value)
        && let Some(first) = read.bytes().next()
    {
        let kind = Types::of_json(first);
        // Where anything may be, `0x1F` is text like any other.
        let fits = kind != Types::STRING && (kind != Types::NUMBER || types != Types::ANY);
        if fits && types.has(kind) {
            return read;
        }
    }
    quoted(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_text_becomes_what_its_type_says() {
        let some = Types::STRING | Types::NULL;
        for (text, types, wanted) in [
            ("5", Types::NUMBER, "5"),
            (" -1.5e3\n", Types::NUMBER, "-1.5e3"),
            ("5", Types::STRING, "\"5\""),
            ("5", Types::ANY, "5"),
            ("five", Types::NUMBER, "\"five\""),
            ("true", Types::BOOLEAN, "true"),
            ("True", Types::BOOLEAN, "true"),
            ("True", Types::STRING, "\"True\""),
            ("null", some, "null"),
            ("None", some, "null"),
            ("nobody", some, "\"nobody\""),
            ("[1, \"a\"]", Types::ARRAY, "[1, \"a\"]"),
            ("['a', None]", Types::ARRAY, "[\"a\", null]"),
            ("{'a': {'b': 1}}", Types::OBJECT, "{\"a\": {\"b\": 1}}"),
            ("{\"a\"", Types::OBJECT, "\"{\\\"a\\\"\""),
            ("\"Paris\"", Types::STRING, "\"\\\"Paris\\\"\""),
            ("\"Paris\"", Types::ANY, "\"Paris\""),
            ("Paris", Types::ANY, "\"Paris\""),
            ("", Types::ANY, "\"\""),
            ("0x1F", Types::NUMBER, "31"),
            ("0x1F", Types::ANY, "\"0x1F\""),
            ("{\"a\": 1}", Types::STRING, "\"{\\\"a\\\": 1}\""),
        ] {
            assert_eq!(typed(text, types), wanted, "{text} {types:?}");
            assert!(is_json(&typed(text, types)));
        }
    }

    #[test]
    fn what_is_escaped_is_read_back() {
        let text = "a\"b\\c\n\r\t\u{1}\u{7f}é😀/";
        assert_eq!(serde_json::from_str::<String>(&quoted(text)).unwrap(), text);
    }
}
