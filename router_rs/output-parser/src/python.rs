//! Literals of Python, as JSON.

use crate::{
    look::is_space,
    value::{is_json, quoted},
};

/// Containers within each other that are read.
const MOST_DEPTH: u32 = 64;

/// A literal, all of the text: `None` where it is none. Names stand for themselves, as
/// strings.
pub(crate) fn literal(text: &str) -> Option<String> {
    let mut reader = Reader { rest: text };
    let mut out = String::new();
    reader.value(MOST_DEPTH, &mut out)?;
    reader.space();
    reader.rest.is_empty().then_some(out)
}

/// Named arguments of a call, as an object; what is behind its first bracket and before its
/// last. A single dictionary is all of them.
pub(crate) fn arguments(text: &str) -> Option<String> {
    let mut reader = Reader { rest: text };
    let mut out = String::from("{");
    reader.space();
    if reader.rest.starts_with('{') {
        return literal(text);
    }
    while !reader.rest.is_empty() {
        if out.len() > 1 {
            out.push_str(", ");
        }
        let name = reader.word()?;
        reader.space();
        reader.take('=')?;
        out.push_str(&quoted(name));
        out.push_str(": ");
        reader.value(MOST_DEPTH, &mut out)?;
        reader.space();
        if reader.rest.is_empty() {
            break;
        }
        reader.take(',')?;
        reader.space();
    }
    out.push('}');
    Some(out)
}

struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    fn space(&mut self) {
        self.rest = self
            .rest
            .trim_start_matches(|letter: char| u8::try_from(letter).is_ok_and(is_space));
    }

    fn take(&mut self, wanted: char) -> Option<()> {
        self.rest = self.rest.strip_prefix(wanted)?;
        Some(())
    }

    /// A name or a number, not empty.
    fn word(&mut self) -> Option<&'a str> {
        let part =
            |letter: char| letter.is_alphanumeric() || matches!(letter, '_' | '.' | '-' | '+');
        let end = self.rest.find(|letter| !part(letter));
        let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        self.rest = rest;
        Some(word).filter(|word| !word.is_empty())
    }

    fn value(&mut self, depth: u32, out: &mut String) -> Option<()> {
        self.space();
        let raw = self.rest.starts_with(['r', 'R']) && self.rest[1..].starts_with(['"', '\'']);
        if raw {
            self.rest = &self.rest[1..];
        }
        match self.rest.chars().next()? {
            '"' | '\'' => out.push_str(&quoted(&self.string(raw)?)),
            '[' => self.several(']', depth.checked_sub(1)?, out)?,
            '(' => self.several(')', depth.checked_sub(1)?, out)?,
            '{' => self.dictionary(depth.checked_sub(1)?, out)?,
            _ => out.push_str(&word(self.word()?)),
        }
        Some(())
    }

    /// A list, or a tuple.
    fn several(&mut self, close: char, depth: u32, out: &mut String) -> Option<()> {
        self.rest = &self.rest[1..];
        out.push('[');
        let mut first = true;
        loop {
            self.space();
            if self.take(close).is_some() {
                break;
            }
            if !std::mem::replace(&mut first, false) {
                out.push_str(", ");
            }
            self.value(depth, out)?;
            self.space();
            if self.take(',').is_none() {
                self.take(close)?;
                break;
            }
        }
        out.push(']');
        Some(())
    }

    fn dictionary(&mut self, depth: u32, out: &mut String) -> Option<()> {
        self.rest = &self.rest[1..];
        out.push('{');
        let mut first = true;
        loop {
            self.space();
            if self.take('}').is_some() {
                break;
            }
            if !std::mem::replace(&mut first, false) {
                out.push_str(", ");
            }
            let key = out.len();
            self.value(depth, out)?;
            // Keys of JSON are strings.
            match out.as_bytes().get(key)? {
                b'"' => {}
                b'{' | b'[' => return None,
                _ => {
                    out.insert(key, '"');
                    out.push('"');
                }
            }
            self.space();
            self.take(':')?;
            out.push_str(": ");
            self.value(depth, out)?;
            self.space();
            if self.take(',').is_none() {
                self.take('}')?;
                break;
            }
        }
        out.push('}');
        Some(())
    }

    /// What a string says. `raw`: its backslashes are its own.
    fn string(&mut self, raw: bool) -> Option<String> {
        let quote = self.rest.get(..1)?;
        let triple = quote.repeat(3);
        let mark = match self.rest.starts_with(&triple) {
            true => triple.as_str(),
            false => quote,
        };
        self.rest = self.rest.strip_prefix(mark)?;
        let mut said = String::new();
        loop {
            if let Some(rest) = self.rest.strip_prefix(mark) {
                self.rest = rest;
                return Some(said);
            }
            let letter = self.letter()?;
            match letter {
                '\\' if raw => {
                    said.push(letter);
                    said.push(self.letter()?);
                }
                '\\' => self.escaped(&mut said)?,
                _ => said.push(letter),
            }
        }
    }

    fn letter(&mut self) -> Option<char> {
        let mut letters = self.rest.chars();
        let letter = letters.next()?;
        self.rest = letters.as_str();
        Some(letter)
    }

    /// Behind a backslash.
    fn escaped(&mut self, said: &mut String) -> Option<()> {
        let letter = self.letter()?;
        let meant = match letter {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'a' => '\u{7}',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'v' => '\u{b}',
            '0' => '\0',
            '\\' | '\'' | '"' => letter,
            // The line goes on.
            '\n' => return Some(()),
            'x' => self.code(2)?,
            'u' => self.code(4)?,
            'U' => self.code(8)?,
            // As Python has it: none of its escapes.
            other => {
                said.push('\\');
                other
            }
        };
        said.push(meant);
        Some(())
    }

    /// A character by its number of so many digits; halves of one that stand alone are
    /// shown as what cannot be shown.
    fn code(&mut self, digits: usize) -> Option<char> {
        let number = self.digits(digits)?;
        if let (0xd800..=0xdbff, Some(rest)) = (number, self.rest.strip_prefix("\\u")) {
            let mut behind = Reader { rest };
            if let Some(low @ 0xdc00..=0xdfff) = behind.digits(4) {
                self.rest = behind.rest;
                return char::from_u32(0x1_0000 + ((number - 0xd800) << 10) + (low - 0xdc00));
            }
        }
        Some(char::from_u32(number).unwrap_or(char::REPLACEMENT_CHARACTER))
    }

    fn digits(&mut self, count: usize) -> Option<u32> {
        let digits = self.rest.get(..count)?;
        let all = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u32::from_str_radix(digits, 16).ok().filter(|_| all)?;
        self.rest = &self.rest[count..];
        Some(number)
    }
}

/// A name or a number.
fn word(word: &str) -> String {
    match word {
        "True" => return "true".to_owned(),
        "False" => return "false".to_owned(),
        "None" => return "null".to_owned(),
        _ if is_json(word) => return word.to_owned(),
        _ => {}
    }
    if !word
        .starts_with(|letter: char| letter.is_ascii_digit() || matches!(letter, '-' | '+' | '.'))
    {
        return quoted(word);
    }
    let (sign, plain) = match word.strip_prefix('-') {
        Some(plain) => ("-", plain),
        None => ("", word.strip_prefix('+').unwrap_or(word)),
    };
    let plain = plain.replace('_', "");
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        let digits = plain.strip_prefix(prefix);
        if let Some(number) = digits.and_then(|digits| u64::from_str_radix(digits, radix).ok()) {
            return format!("{sign}{number}");
        }
    }
    let whole = match plain.strip_prefix('.') {
        Some(fraction) => format!("{sign}0.{fraction}"),
        None => match plain.strip_suffix('.') {
            Some(number) => format!("{sign}{number}.0"),
            None => format!("{sign}{plain}"),
        },
    };
    match is_json(&whole) {
        true => whole,
        false => quoted(word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_become_json() {
        for (python, json) in [
            ("'it\\'s'", "\"it's\""),
            ("\"a\\n\\x41\\u00e9\\d\"", "\"a\\nAé\\\\d\""),
            ("'\\ud83d\\ude00 \\ud83d'", "\"😀 \u{fffd}\""),
            ("'''a\n'b'\n'''", "\"a\\n'b'\\n\""),
            ("\"\"", "\"\""),
            ("r'\\d'", "\"\\\\d\""),
            (
                "[1, -2.5, (True, None,), []]",
                "[1, -2.5, [true, null], []]",
            ),
            (
                "{'a': {1: 'x'}, \"b\": false,}",
                "{\"a\": {\"1\": \"x\"}, \"b\": false}",
            ),
            ("1_000", "1000"),
            ("0x1F", "31"),
            (".5", "0.5"),
            ("-5.", "-5.0"),
            ("+7", "7"),
            ("007", "\"007\""),
            ("celsius", "\"celsius\""),
            ("2024-05-01", "\"2024-05-01\""),
        ] {
            assert_eq!(literal(python).as_deref(), Some(json), "{python}");
            assert!(is_json(json), "{json}");
        }
        for none in [
            "", "'a", "[1", "{1}", "f(1)", "1 2", "{[1]: 2}", "'\\u12'", "a b", "{'a' 1}",
        ] {
            assert_eq!(literal(none), None, "{none}");
        }
        let deep = "[".repeat(1_000) + &"]".repeat(1_000);
        assert_eq!(literal(&deep), None);
    }

    #[test]
    fn named_arguments_become_an_object() {
        for (python, json) in [
            ("", "{}"),
            ("  ", "{}"),
            ("a=1, b = 'x',", "{\"a\": 1, \"b\": \"x\"}"),
            ("{'a': 1}", "{\"a\": 1}"),
        ] {
            assert_eq!(arguments(python).as_deref(), Some(json), "{python}");
        }
        for none in ["'x'", "a=1 b=2", "a=", "a", ",", "a==1"] {
            assert_eq!(arguments(none), None, "{none}");
        }
    }
}
