//! Whether this router could go on with what a worker has.

use kvmesh_session::{
    parse::{Found, Holds, Left},
    takeover::Fit,
};

use super::{Taking, asked::request};

impl Taking {
    /// Whether this router can go on with what a worker has, as far as it tells.
    pub(super) fn fit(&self, found: &Found) -> Fit {
        match &found.what {
            Holds::Nothing | Holds::Refused { .. } => Fit::Now,
            // It does not tell: what it has is seen when it is given.
            Holds::This(_, told) if told.model.is_empty() => Fit::Now,
            Holds::This(_, told) => match self.had.is_none_or(|had| had == told.output_digest) {
                true => self.fit_of(&told.model),
                false => Fit::Never,
            },
            Holds::Claimed(_, left) => self.fit_of_left(left),
        }
    }

    fn fit_of(&self, model: &str) -> Fit {
        let models = &self.core.models;
        match models.get(model) {
            Some(_) => Fit::Now,
            None if models.told(model) => Fit::Later,
            None => Fit::Never,
        }
    }

    fn fit_of_left(&self, left: &Left) -> Fit {
        if !self.asked.fits(&left.output_ids) {
            return Fit::Never;
        }
        let Ok((request, _)) = request(left, &self.asked) else {
            return Fit::Never;
        };
        let model = self.core.models.get(&request.model);
        let stops = model.zip(request.text.as_ref());
        match stops.map(|(model, text)| model.text.stream(text)) {
            Some(Err(_)) => Fit::Never,
            _ => self.fit_of(&request.model),
        }
    }
}
