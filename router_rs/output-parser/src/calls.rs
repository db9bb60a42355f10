//! Calls in content: where they begin, what is behind them, and what of it is content
//! after all.

use crate::{
    Calls, ToolFormat,
    arguments::Arguments,
    deepseek,
    event::Events,
    hermes, llama,
    look::{Look, More, consume, first, is_space, partial, space_before},
    mistral,
    object::{CallObject, Progress, Rules},
};

/// What is behind the mark of a call.
pub(crate) enum Opening {
    /// No call.
    None,
    /// An object that may be one, so many bytes behind the mark.
    Object(usize),
    /// A list of such objects; where the first is.
    List(usize),
    /// Arguments of this tool.
    Arguments(usize, String),
}

/// What is behind a call.
pub(crate) enum After {
    /// Its last part ends so many bytes on; other text follows.
    Content(usize),
    /// An object that may be one more, so many bytes on.
    Object(usize),
}

/// How a model writes calls.
#[derive(Clone, Debug)]
pub(crate) struct Dialect {
    kind: Kind,
    /// Names of the tools; of a forced call its own alone.
    names: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hermes,
    Llama,
    Mistral,
    DeepSeek,
    List,
    One,
}

impl Dialect {
    /// `None`: nothing in content is a call.
    pub(crate) fn of(calls: &Calls) -> Option<Self> {
        let (kind, names) = match calls {
            Calls::None => return None,
            Calls::List => (Kind::List, Vec::new()),
            Calls::One(name) => (Kind::One, vec![name.clone()]),
            Calls::Native { format, names } => {
                let kind = match format {
                    ToolFormat::Hermes => Kind::Hermes,
                    ToolFormat::Llama3 => Kind::Llama,
                    ToolFormat::Mistral => Kind::Mistral,
                    ToolFormat::DeepSeek => Kind::DeepSeek,
                    ToolFormat::Harmony => return None,
                };
                (kind, names.clone())
            }
        };
        Some(Self { kind, names })
    }

    /// Marks that a call begins with.
    fn marks(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Hermes => &[hermes::OPEN],
            Kind::Llama => &[llama::OPEN],
            Kind::Mistral => &[mistral::OPEN],
            Kind::DeepSeek => deepseek::OPENING,
            Kind::List | Kind::One => &[],
        }
    }

    /// Marks behind arguments that stand by themselves.
    fn closing(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::Mistral => mistral::CLOSING,
            Kind::DeepSeek => deepseek::CLOSING,
            _ => &[],
        }
    }

    fn rules(&self) -> Rules<'_> {
        let llama = self.kind == Kind::Llama;
        Rules {
            names: llama.then_some(&self.names),
            bare: !llama,
            closing: match self.kind {
                Kind::Hermes => hermes::CLOSE,
                _ => "",
            },
        }
    }

    fn open(&self, look: Look<'_>) -> Result<Opening, More> {
        match self.kind {
            Kind::Hermes => hermes::open(look),
            Kind::Llama => llama::open(look),
            Kind::Mistral => mistral::open(look),
            Kind::DeepSeek => deepseek::open(look),
            Kind::List | Kind::One => Ok(Opening::None),
        }
    }

    fn after(&self, look: Look<'_>, list: bool) -> Result<After, More> {
        match self.kind {
            _ if list => mistral::after(look),
            Kind::Hermes => hermes::after(look),
            Kind::Llama => llama::after(look),
            Kind::DeepSeek => deepseek::after(look),
            Kind::Mistral | Kind::List | Kind::One => Ok(After::Content(0)),
        }
    }

    /// What an output begins with where no mark is needed.
    fn begin(&self, mut look: Look<'_>) -> Result<Opening, More> {
        match self.kind {
            Kind::Llama => llama::open(look),
            Kind::List => {
                look.space();
                let list = look.literal("[")?;
                look.space();
                Ok(match look.peek()? {
                    Some(b'{') if list => Opening::List(look.at),
                    Some(b'{') => Opening::Object(look.at),
                    _ => Opening::None,
                })
            }
            Kind::One => {
                look.space();
                Ok(match (look.peek()?, self.names.first()) {
                    (Some(_), Some(name)) => Opening::Arguments(look.at, name.clone()),
                    _ => Opening::None,
                })
            }
            Kind::Hermes | Kind::Mistral | Kind::DeepSeek => Ok(Opening::None),
        }
    }
}

/// ```text
/// Begin ──▶ Content ─mark─▶ Open ─▶ Object | Arguments ─▶ After ─▶ Gap ─▶ Content
///                ▲───none────┴─────────┘        ▲──────────┘
/// ```
#[derive(Debug)]
enum State {
    /// Nothing was told.
    Begin,
    Content,
    /// So many bytes of white space and a mark, and what is behind them.
    Open(usize),
    /// Behind so many bytes an object that may be a call, of a list or alone.
    Object {
        before: usize,
        call: CallObject,
        list: bool,
    },
    Arguments(Arguments),
    /// A call has ended.
    After {
        list: bool,
    },
    /// White space between calls and content.
    Gap,
}

/// Finds calls in content.
#[derive(Debug)]
pub(crate) struct CallParser {
    dialect: Dialect,
    state: State,
    /// Content that is not told.
    held: String,
}

impl CallParser {
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            state: State::Begin,
            held: String::new(),
        }
    }

    pub(crate) fn push(&mut self, text: &str, out: &mut Events) {
        self.held.push_str(text);
        self.read(false, out);
    }

    pub(crate) fn finish(&mut self, out: &mut Events) {
        self.read(true, out);
    }

    fn read(&mut self, ended: bool, out: &mut Events) {
        let mut held = std::mem::take(&mut self.held);
        consume(&mut held, |text| self.step(text, ended, out));
        self.held = held;
    }

    /// Takes some bytes, or goes on to another state; `None`: more have to come.
    fn step(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        match &mut self.state {
            State::Begin => {
                let opening = self.dialect.begin(Look::new(text, ended)).ok()?;
                Some(self.opened(opening, text, 0, out))
            }
            State::Content => self.content(text, ended, out),
            State::Open(mark) => {
                let mark = *mark;
                let look = Look::new(&text[mark..], ended);
                let opening = self.dialect.open(look).ok()?;
                Some(self.opened(opening, text, mark, out))
            }
            State::Object { .. } => self.object(text, ended, out),
            State::Arguments(arguments) => match arguments.read(text, ended, out) {
                Progress::Call(end) => {
                    self.state = State::After { list: false };
                    Some(end)
                }
                Progress::More | Progress::None => Some(arguments.cut()).filter(|cut| *cut > 0),
            },
            State::After { list } => {
                let list = *list;
                match self.dialect.after(Look::new(text, ended), list).ok()? {
                    After::Content(end) => {
                        self.state = State::Gap;
                        Some(end)
                    }
                    After::Object(before) => {
                        self.state = object(before, list);
                        Some(0)
                    }
                }
            }
            State::Gap => {
                let space = text.bytes().take_while(|byte| is_space(*byte)).count();
                if space < text.len() {
                    self.state = State::Content;
                    return Some(space);
                }
                (space > 0).then_some(space)
            }
        }
    }

    /// Goes on behind `mark` bytes of white space and a mark.
    fn opened(&mut self, opening: Opening, text: &str, mark: usize, out: &mut Events) -> usize {
        match opening {
            Opening::None => {
                out.content(&text[..mark]);
                self.state = State::Content;
                mark
            }
            Opening::Object(at) => {
                self.state = object(mark + at, false);
                0
            }
            Opening::List(at) => {
                self.state = object(mark + at, true);
                0
            }
            Opening::Arguments(at, name) => {
                out.call(name);
                self.state = State::Arguments(Arguments::new(self.dialect.closing()));
                mark + at
            }
        }
    }

    fn content(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        let marks = self.dialect.marks();
        if let Some((at, mark)) = first(text, marks) {
            let told = space_before(text, at);
            out.content(&text[..told]);
            self.state = State::Open(at - told + mark.len());
            return Some(told);
        }
        let told = match ended || marks.is_empty() {
            true => text.len(),
            false => space_before(text, partial(text, marks)),
        };
        out.content(&text[..told]);
        (told > 0).then_some(told)
    }

    fn object(&mut self, text: &str, ended: bool, out: &mut Events) -> Option<usize> {
        let State::Object { before, call, list } = &mut self.state else {
            return None;
        };
        let rules = self.dialect.rules();
        match call.read(&text[*before..], ended, &rules, out) {
            Progress::Call(end) => {
                let took = *before + end;
                self.state = State::After { list: *list };
                Some(took)
            }
            Progress::More => {
                let cut = call.cut();
                if !call.is_call() {
                    return None;
                }
                let took = std::mem::take(before) + cut;
                (took > 0).then_some(took)
            }
            Progress::None => {
                let before = *before;
                out.content(&text[..before]);
                self.state = State::Content;
                Some(before)
            }
        }
    }
}

fn object(before: usize, list: bool) -> State {
    State::Object {
        before,
        call: CallObject::new(),
        list,
    }
}
