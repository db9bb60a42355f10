//! A call that is a JSON object with a name and arguments.

use crate::{
    event::Events,
    json::{ObjectScan, Seen},
    tool::{Tool, named},
};

/// Longest text that may be a call and is not known to be one, bytes: until then nothing
/// of it is told.
pub(crate) const MOST_HELD: usize = 16 << 10;

/// What makes an object a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules<'a> {
    /// Its name has to be that of one of these; `None`: any will do.
    pub(crate) tools: Option<&'a [Tool]>,
    /// Without arguments it is one as well.
    pub(crate) bare: bool,
    /// Ends the call wherever it is no part of a string; may be empty.
    pub(crate) closing: &'a str,
}

/// How far a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// More of it has to come.
    More,
    /// It was a call, and ended before this byte.
    Call(usize),
    /// It is none.
    None,
}

/// What a member of an object is to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Name,
    Arguments,
    Other,
}

/// Reads one object, at the beginning of a text that grows.
#[derive(Clone, Debug)]
pub(crate) struct CallObject {
    scan: ObjectScan,
    /// Bytes that were looked at.
    at: usize,
    /// Where the last key or value begins.
    begin: usize,
    member: Member,
    name: Option<String>,
    /// Where the arguments begin, and where they end if they have.
    arguments: Option<(usize, Option<usize>)>,
    /// Once it is known to be a call: where what was told of its arguments ends.
    told: Option<usize>,
}

impl CallObject {
    pub(crate) fn new() -> Self {
        Self {
            scan: ObjectScan::new(),
            at: 0,
            begin: 0,
            member: Member::Other,
            name: None,
            arguments: None,
            told: None,
        }
    }

    /// It is known to be a call: its text will not be told as content.
    pub(crate) fn is_call(&self) -> bool {
        self.told.is_some()
    }

    /// How many bytes at its beginning nobody looks at any more; they are to be taken
    /// off.
    pub(crate) fn cut(&mut self) -> usize {
        let Some(told) = &mut self.told else { return 0 };
        let cut = match self.arguments {
            Some((_, None)) => *told,
            _ => self.begin.min(self.at),
        };
        *told = told.saturating_sub(cut);
        self.at -= cut;
        self.begin = self.begin.saturating_sub(cut);
        if let Some((from, to)) = &mut self.arguments {
            *from = from.saturating_sub(cut);
            *to = to.map(|to| to.saturating_sub(cut));
        }
        cut
    }

    /// Looks at what has come of it. `text` begins with it, less what was cut.
    pub(crate) fn read(
        &mut self,
        text: &str,
        ended: bool,
        rules: &Rules<'_>,
        out: &mut Events,
    ) -> Progress {
        let progress = self.look(text, ended, rules, out);
        if progress == Progress::More {
            self.tell(text, self.at, out);
            return match (ended, self.is_call()) {
                (false, _) => Progress::More,
                (true, true) => Progress::Call(text.len()),
                (true, false) => Progress::None,
            };
        }
        progress
    }

    fn look(&mut self, text: &str, ended: bool, rules: &Rules<'_>, out: &mut Events) -> Progress {
        let closing = rules.closing.as_bytes().first();
        while let Some(byte) = text.as_bytes().get(self.at) {
            if !self.is_call() && self.at >= MOST_HELD {
                return Progress::None;
            }
            if closing == Some(byte) && !self.scan.in_string() {
                let rest = &text[self.at..];
                if rest.starts_with(rules.closing) {
                    return self.broken(text, out);
                }
                if !ended && rules.closing.starts_with(rest) {
                    return Progress::More;
                }
            }
            let seen = self.scan.take(*byte);
            match seen {
                Seen::More => {}
                Seen::KeyBegins => self.begin = self.at,
                Seen::KeyEnds => self.member = member(&text[self.begin..=self.at]),
                Seen::ValueBegins => self.value_begins(out),
                Seen::ValueEnds | Seen::ValueEnded => {
                    let end = self.at + usize::from(seen == Seen::ValueEnds);
                    if !self.value_ends(text, end, rules, out) {
                        return Progress::None;
                    }
                    if seen == Seen::ValueEnded {
                        // This byte is the object's own.
                        continue;
                    }
                }
                Seen::Ends => {
                    self.at += 1;
                    return self.ends(rules, out);
                }
                Seen::Wrong => return self.broken(text, out),
            }
            self.at += 1;
        }
        Progress::More
    }

    fn value_begins(&mut self, out: &mut Events) {
        self.begin = self.at;
        if self.member == Member::Arguments && self.arguments.is_none() {
            self.arguments = Some((self.at, None));
            if let Some(name) = &self.name {
                out.call(name.clone());
                self.told = Some(self.at);
            }
        }
    }

    /// False: it is no call.
    fn value_ends(&mut self, text: &str, end: usize, rules: &Rules<'_>, out: &mut Events) -> bool {
        match self.member {
            Member::Name if self.name.is_none() => {
                let Ok(name) = serde_json::from_str::<String>(&text[self.begin..end]) else {
                    return false;
                };
                let known = rules
                    .tools
                    .is_none_or(|tools| named(tools, &name).is_some());
                if name.is_empty() || !known {
                    return false;
                }
                if let Some((from, Some(to))) = self.arguments {
                    out.call(name.clone());
                    out.arguments(&text[from..to]);
                    self.told = Some(end);
                }
                self.name = Some(name);
            }
            Member::Arguments if matches!(self.arguments, Some((_, None))) => {
                self.tell(text, end, out);
                self.arguments = self.arguments.map(|(from, _)| (from, Some(end)));
            }
            _ => {}
        }
        true
    }

    /// Tells of arguments that are not at their end, up to here.
    fn tell(&mut self, text: &str, to: usize, out: &mut Events) {
        if let (Some(told), Some((_, None))) = (&mut self.told, self.arguments) {
            out.arguments(&text[*told..to]);
            *told = to;
        }
    }

    fn ends(&mut self, rules: &Rules<'_>, out: &mut Events) -> Progress {
        match &self.name {
            _ if self.is_call() => Progress::Call(self.at),
            Some(name) if rules.bare => {
                out.call(name.clone());
                out.arguments("{}");
                Progress::Call(self.at)
            }
            _ => Progress::None,
        }
    }

    /// What comes next is no part of an object.
    fn broken(&mut self, text: &str, out: &mut Events) -> Progress {
        self.tell(text, self.at, out);
        match self.is_call() {
            true => Progress::Call(self.at),
            false => Progress::None,
        }
    }
}

/// What the key is, with its quotes.
fn member(key: &str) -> Member {
    match key {
        "\"name\"" => Member::Name,
        "\"arguments\"" | "\"parameters\"" => Member::Arguments,
        _ => Member::Other,
    }
}
