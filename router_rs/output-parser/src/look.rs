//! Looking at text of which more may come.

/// Most white space that a format may have between two of its parts, and that is held
/// back before a mark, bytes. More of it is content.
pub(crate) const MOST_SPACE: usize = 64;

/// Longest name of a tool or a parameter, bytes.
pub(crate) const MOST_NAME: usize = 256;

/// White space of JSON, and of the formats here.
pub(crate) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

/// A place in text that ends here, or of which more may come.
#[derive(Clone, Copy)]
pub(crate) struct Look<'a> {
    text: &'a str,
    /// Bytes passed.
    pub(crate) at: usize,
    ended: bool,
}

/// More text has to come before anything can be said.
pub(crate) struct More;

impl<'a> Look<'a> {
    pub(crate) fn new(text: &'a str, ended: bool) -> Self {
        Self { text, at: 0, ended }
    }

    /// What is left.
    pub(crate) fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// Passes white space, up to [`MOST_SPACE`].
    pub(crate) fn space(&mut self) {
        let rest = self.rest().as_bytes();
        let space = rest.iter().take(MOST_SPACE).take_while(|b| is_space(**b));
        self.at += space.count();
    }

    /// The next byte; `None` at the end of the text.
    pub(crate) fn peek(&self) -> Result<Option<u8>, More> {
        match self.rest().as_bytes().first() {
            None if !self.ended => Err(More),
            first => Ok(first.copied()),
        }
    }

    /// Passes this text, if it is what comes next.
    pub(crate) fn literal(&mut self, wanted: &str) -> Result<bool, More> {
        let rest = self.rest();
        if rest.starts_with(wanted) {
            self.at += wanted.len();
            return Ok(true);
        }
        match !self.ended && wanted.starts_with(rest) {
            true => Err(More),
            false => Ok(false),
        }
    }

    /// Passes what names are made of.
    pub(crate) fn word(&mut self) -> Result<&'a str, More> {
        let part = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
        let rest = self.rest();
        let length = rest.bytes().take(MOST_NAME).take_while(part).count();
        self.at += length;
        self.peek()?;
        Ok(&rest[..length])
    }

    /// Passes all before the first of these letters, at most so many bytes. `None`: none of
    /// them is there.
    pub(crate) fn before(
        &mut self,
        letters: &[char],
        most: usize,
    ) -> Result<Option<&'a str>, More> {
        let rest = self.rest();
        let end = rest.floor_char_boundary(most + 1);
        match rest[..end].find(letters) {
            Some(at) => {
                self.at += at;
                Ok(Some(&rest[..at]))
            }
            None if !self.ended && rest.len() <= most => Err(More),
            _ => Ok(None),
        }
    }

    /// Passes all before this mark, and the mark: at most so many bytes of text before
    /// it. `None`: the mark is not there.
    pub(crate) fn until(&mut self, mark: &str, most: usize) -> Result<Option<&'a str>, More> {
        let rest = self.rest();
        // No further than it may be: what is behind that is looked at again and again.
        let end = rest.floor_char_boundary(most + mark.len());
        match rest[..end].find(mark) {
            Some(at) => {
                self.at += at + mark.len();
                Ok(Some(&rest[..at]))
            }
            None if !self.ended && rest.len() <= most + mark.len() => Err(More),
            _ => Ok(None),
        }
    }
}

/// Has `step` take bytes from the beginning of a text, until it asks for more.
pub(crate) fn consume(held: &mut String, mut step: impl FnMut(&str) -> Option<usize>) {
    let mut at = 0;
    while let Some(took) = step(&held[at..]) {
        at += took;
    }
    held.drain(..at);
}

/// The first of these marks in a text.
pub(crate) fn first<'m>(text: &str, marks: &[&'m str]) -> Option<(usize, &'m str)> {
    let found = marks
        .iter()
        .filter_map(|mark| Some((text.find(mark)?, *mark)));
    // Of two at one place the longer one: none of ours begins with another.
    found.min_by_key(|(at, mark)| (*at, std::cmp::Reverse(mark.len())))
}

/// Where the longest end of a text begins that may become one of these marks; the
/// length of the text where none does.
pub(crate) fn partial(text: &str, marks: &[&str]) -> usize {
    let longest = marks.iter().map(|mark| mark.len()).max().unwrap_or(0);
    let from = text.len().saturating_sub(longest.saturating_sub(1));
    (from..text.len())
        .filter(|at| text.is_char_boundary(*at))
        .find(|at| marks.iter().any(|mark| mark.starts_with(&text[*at..])))
        .unwrap_or(text.len())
}

/// Where the white space before `end` begins that is held back there.
pub(crate) fn space_before(text: &str, end: usize) -> usize {
    let before = text.as_bytes()[..end].iter().rev().take(MOST_SPACE);
    end - before.take_while(|byte| is_space(**byte)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_seen_coming() {
        let marks = ["<tool_call>", "[X]"];
        assert_eq!(partial("say <tool", &marks), 4);
        assert_eq!(partial("say <tool_call", &marks), 4);
        assert_eq!(partial("say <<", &marks), 5);
        assert_eq!(partial("say [X", &marks), 4);
        assert_eq!(partial("say", &marks), 3);
        assert_eq!(partial("é<", &["<｜x｜>"]), 2);
        assert_eq!(partial("é<｜", &["<｜x｜>"]), 2);
    }

    #[test]
    fn space_before_a_mark_has_a_bound() {
        assert_eq!(space_before("a \n<", 3), 1);
        let long = format!("a{}", " ".repeat(100));
        assert_eq!(space_before(&long, long.len()), 101 - MOST_SPACE);
    }
}
