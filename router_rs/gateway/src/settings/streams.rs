//! What the settings say of streams that go on elsewhere.

use super::Layers;
use crate::mesh::StreamSettings;

impl StreamSettings {
    pub(super) fn of(layers: &Layers) -> Self {
        let tries = layers.number("hand_over_tries");
        let at_once = layers.number("hand_overs_at_once");
        Self {
            hand_overs_at_once: usize::try_from(at_once).unwrap_or(usize::MAX),
            hand_over_tries: u32::try_from(tries).unwrap_or(u32::MAX),
            tenant_resumes_per_s: layers.real("tenant_resumes_per_s"),
            resume_timeout: layers.duration("resume_timeout"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_is_shipped_is_what_the_keys_say() {
        assert_eq!(
            StreamSettings::of(&Layers::default()),
            StreamSettings::default()
        );
        let mut layers = Layers::default();
        let set = r#"{"hand_overs_at_once": 2, "hand_over_tries": 9,
            "tenant_resumes_per_s": 0.5, "resume_timeout": "250ms"}"#;
        layers.add_json("test", set).unwrap();
        let told = StreamSettings {
            hand_overs_at_once: 2,
            hand_over_tries: 9,
            tenant_resumes_per_s: 0.5,
            resume_timeout: Duration::from_millis(250),
        };
        assert_eq!(StreamSettings::of(&layers), told);
    }
}
