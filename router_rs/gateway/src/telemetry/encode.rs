//! Figures in the form that scrapers read: one function a kind of series.

use std::fmt;

use prometheus_client::{
    encoding::{
        DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder, NoLabelSet,
    },
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use super::Histogram;
use crate::mesh::{Count, Counters, Ratios};

/// Labels of one series, in order.
pub(super) struct Labels<'a>(pub(super) &'a [(&'static str, &'a str)]);

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        for pair in self.0 {
            (pair.0, pair.1).encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

/// Labels and value.
pub(super) type Series<'a> = (Vec<(&'static str, &'a str)>, u64);

pub(super) fn gauges(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: &[Series<'_>],
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in series {
        let value = ConstGauge::new(i64::try_from(*value).unwrap_or(i64::MAX));
        value.encode(metric.encode_family(&Labels(labels))?)?;
    }
    Ok(())
}

pub(super) fn by_state(states: &[(&'static str, u64)]) -> Vec<Series<'static>> {
    let series = |(state, n): &(&'static str, u64)| (vec![("state", *state)], *n);
    states.iter().map(series).collect()
}

pub(super) fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: u64,
) -> fmt::Result {
    let value = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    value.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

pub(super) fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    from: &Count,
) -> fmt::Result {
    let value = ConstCounter::new(from.get());
    value.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

/// Times that are summed, and the longest of one kind.
pub(super) fn seconds(encoder: &mut DescriptorEncoder<'_>, counts: &Counters) -> fmt::Result {
    for (name, help, from) in [
        (
            "decide_seconds",
            "Time from asking for a plan to its bookings",
            &counts.decide,
        ),
        (
            "moved_gap_seconds",
            "From the last token before a failure to the first after it",
            &counts.moved_gap,
        ),
    ] {
        let value = ConstCounter::new(from.get());
        value.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
    }
    let longest = ConstGauge::new(counts.longest_moved_gap.get());
    longest.encode(encoder.encode_descriptor(
        "longest_moved_gap_seconds",
        "Longest gap of a stream that went on after a failure",
        None,
        MetricType::Gauge,
    )?)
}

pub(super) fn histogram(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    from: &Histogram,
) -> fmt::Result {
    let (sum, count, buckets) = from.read();
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}

pub(super) fn ratios(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    from: &Ratios,
) -> fmt::Result {
    let (sum, count, buckets) = from.read();
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
}
