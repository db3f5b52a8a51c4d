"""Every word of the reports, in English and Japanese. Both tables have the same keys and the same placeholders."""

from __future__ import annotations

from llm_quantize.errors import UsageError

LANGUAGES = ("en", "ja")

_EN = {
    "title": "{model}: quantized and measured",
    "eyebrow": "Quantized and measured",
    "facts": "{architecture} · {parameters} parameters · {layers} layers · {dtype}, {size}",
    "verdict_take": "Take {label}.",
    "verdict_one": "{label} was measured.",
    "verdict_figures": "{size}, {share} % of the source, at a mean KL divergence of {kld} nats. In {same} % of "
    "{tokens} places it agrees with the source on the likeliest next token.",
    "verdict_bend": "Along the front of best sizes this is the bend, where more bytes begin to buy less:",
    "verdict_middle": "The front of best sizes has no clear bend; this is its middle:",
    "verdict_larger": "{label} is {percent} % larger and divides the divergence by {ratio}",
    "verdict_smaller": "{label} is {percent} % smaller and multiplies it by {ratio}",
    "join": "; ",
    "space": " ",
    "stop": ".",
    "tile_size": "file size",
    "tile_kld": "mean KL divergence",
    "tile_same": "same likeliest token",
    "tile_speed": "tokens per second, generating",
    "unit_nats": "nats",
    "plot": "Size against loss",
    "plot_lead": "Each point is one file. Lower is closer to the source, left is smaller. The line joins the files "
    "that no other beats in both; hollow points are beaten. Bars are standard errors.",
    "plot_x": "file size",
    "plot_y": "mean KL divergence from the source, nats (logarithmic)",
    "plot_floor": "noise floor",
    "figures": "All figures",
    "variant": "variant",
    "size": "size",
    "bpw": "bits per weight",
    "kld": "KL divergence",
    "same": "same top token",
    "ppl": "perplexity",
    "grade": "grade",
    "memory": "memory in use",
    "prompt": "prompt tokens/s",
    "generation": "generated tokens/s",
    "quantize": "CPU time to quantize",
    "median": "KLD median",
    "p99": "KLD 99 %",
    "p999": "KLD 99.9 %",
    "max": "KLD largest",
    "delta": "Δp RMS",
    "ln_ratio": "ln perplexity ratio",
    "source": "source",
    "more_figures": "How the divergence is spread, and what it does to perplexity",
    "absent": "not measured",
    "heat": "Where the error is",
    "heat_lead": "Relative error of each weight matrix after rounding, ‖Q − W‖ / ‖W‖; layers from left to right. "
    "All maps share one scale.",
    "heat_scale": "relative error",
    "heat_outside": "outside the layers:",
    "layer": "layer",
    "samples": "In their own words",
    "samples_lead": "Every file continues the same beginning, always with the likeliest token. Pale is what it writes "
    "exactly as the source does; from the mark on it goes its own way, which is not always worse.",
    "samples_lead_alone": "Every file continues the same beginning, always with the likeliest token.",
    "samples_prompt": "Beginning:",
    "samples_empty": "(nothing)",
    "method": "How this was measured",
    "method_kld": "Source and variant read the same text, and after each token both say how probable every word of "
    "the vocabulary is next. The Kullback-Leibler divergence, KLD = Σ p (ln p − ln q), says how far the variant's "
    "probabilities q are from the source's p, in nats: 0 where nothing was lost. The mean over all places is shown "
    "with its standard error. Δp is the change in probability of the token that really follows, as root mean square. "
    "The definitions are those of llama.cpp’s llama-perplexity --kl-divergence.",
    "method_text": "Text: {names}; {windows} windows of {context} tokens. The second half of each is scored, so that "
    "every prediction has context: {tokens} places. The source’s perplexity on them is {ppl}. SHA-256 of the tokens: "
    "{sha}.",
    "method_floor": "Noise floor: the source measured against itself shows {floor} nats. A difference below that means "
    "nothing.",
    "method_no_floor": "Standard errors treat the places as independent.",
    "method_grades": "Grades by mean KLD: {grades}.",
    "grade_upto": "{name} below {limit}",
    "grade_above": "{name} from there on",
    "method_speed": "Speed and memory: {runtime} on {cpu}, {threads} threads; median of {repeats} runs after one to "
    "warm up, {prompt} tokens read at once and {new} written one by one, with a float32 cache and no flash attention. "
    "They hold for this machine; compare them with each other only.",
    "method_no_speed": "Speed and memory were not measured: {why}.",
    "note_size": "Size of the whole file, in powers of ten; bits per weight are all its bits, header included, per weight.",
    "note_memory": "Resident memory of a process that loaded the file and read one prompt, nothing subtracted; about "
    "{empty} of it is the empty process.",
    "note_quantize": "CPU time of reading, quantizing and writing. Files made in one run share the reading.",
    "reproduce": "Measure it again",
    "reproduce_lead": "The same commands give the same files byte for byte, and the same divergences.",
    "made_by": "Made by llm-quantize {version}",
    "made_on": " on {date}",
    "source_hash": "Source: {source}, fingerprint {hash}",
    "revision": "revision {revision}",
    "notes": "Notes",
    "markdown_lead": "Measured with llm-quantize {version} on {tokens} "
    "scored tokens ({windows} windows of {context}) of {names}.",
}

_JA = {
    "title": "{model}：量子化の実測レポート",
    "eyebrow": "量子化の実測レポート",
    "facts": "{architecture} ・ パラメータ数 {parameters} ・ {layers} 層 ・ {dtype}、{size}",
    "verdict_take": "おすすめは {label} です。",
    "verdict_one": "{label} を測定しました。",
    "verdict_figures": "サイズは {size}（元モデルの {share} %）、平均 KL ダイバージェンスは {kld} nat です。"
    "{tokens} か所のうち {same} % で、最有力の次トークンが元モデルと一致します。",
    "verdict_bend": "これより大きくしても得られるものが減り始める、パレートフロントの曲がり角にあたります。",
    "verdict_middle": "パレートフロントにはっきりした曲がり角がないため、中央のものを選びました。",
    "verdict_larger": "{label} はサイズが {percent} % 大きく、KL ダイバージェンスは {ratio} 分の 1",
    "verdict_smaller": "{label} はサイズが {percent} % 小さく、KL ダイバージェンスは {ratio} 倍",
    "join": "、",
    "space": "",
    "stop": "です。",
    "tile_size": "ファイルサイズ",
    "tile_kld": "平均 KL ダイバージェンス",
    "tile_same": "最有力トークンの一致率",
    "tile_speed": "生成速度（トークン/秒）",
    "unit_nats": "nat",
    "plot": "サイズと劣化の関係",
    "plot_lead": "1 つの点が 1 つのファイルです。下にあるほど元モデルに近く、左にあるほど小さくなります。"
    "線で結んだものは、サイズと劣化の両方で他に負けていないファイル（パレートフロント）です。白抜きの点は、"
    "ほかに両面で優るものがあります。縦棒は標準誤差を表します。",
    "plot_x": "ファイルサイズ",
    "plot_y": "元モデルからの平均 KL ダイバージェンス（nat、対数目盛）",
    "plot_floor": "測定の下限",
    "figures": "測定値の一覧",
    "variant": "ファイル",
    "size": "サイズ",
    "bpw": "重みあたりビット数",
    "kld": "KL ダイバージェンス",
    "same": "最有力トークン一致率",
    "ppl": "パープレキシティ",
    "grade": "評価",
    "memory": "使用メモリ",
    "prompt": "入力処理（トークン/秒）",
    "generation": "生成（トークン/秒）",
    "quantize": "量子化の CPU 時間",
    "median": "KLD 中央値",
    "p99": "KLD 99 %",
    "p999": "KLD 99.9 %",
    "max": "KLD 最大",
    "delta": "Δp（RMS）",
    "ln_ratio": "ln パープレキシティ比",
    "source": "元モデル",
    "more_figures": "KL ダイバージェンスの分布とパープレキシティへの影響",
    "absent": "未測定",
    "heat": "誤差はどこにあるか",
    "heat_lead": "重み行列ごとの丸めの相対誤差 ‖Q − W‖ / ‖W‖ です。左から右へ層が進みます。色の目盛はすべての図で共通です。",
    "heat_scale": "相対誤差",
    "heat_outside": "層以外：",
    "layer": "層",
    "samples": "実際に書かせてみる",
    "samples_lead": "どのファイルも同じ書き出しから、つねに最有力のトークンを選んで続きを書いています。薄い文字は元モデルと"
    "一字一句同じ部分です。印から先はそれぞれの道を行きますが、悪くなったとは限りません。",
    "samples_lead_alone": "どのファイルも同じ書き出しから、つねに最有力のトークンを選んで続きを書いています。",
    "samples_prompt": "書き出し：",
    "samples_empty": "（出力なし）",
    "method": "測定の方法",
    "method_kld": "元モデルと各ファイルに同じ文章を読ませ、1 トークンごとに、語彙のすべてについて次に来る確率を出させます。"
    "KL ダイバージェンス KLD = Σ p (ln p − ln q) は、そのファイルの確率 q が元モデルの確率 p からどれだけ離れているかを "
    "nat で表した値で、何も失われていなければ 0 です。ここでは全か所の平均と標準誤差を示します。Δp は、実際に続くトークンの"
    "確率の変化（二乗平均平方根）です。定義は llama.cpp の llama-perplexity --kl-divergence と同じです。",
    "method_text": "文章：{names}。{context} トークンの窓を {windows} 個使い、どの予測にも十分な文脈があるよう、各窓の"
    "後半だけを採点しました（{tokens} か所）。元モデルのパープレキシティは {ppl} です。トークン列の SHA-256：{sha}。",
    "method_floor": "測定の下限：元モデルどうしを比べても {floor} nat の差が出ます。これより小さい差に意味はありません。",
    "method_no_floor": "標準誤差は、各か所が独立であるとして計算しています。",
    "method_grades": "評価の基準（平均 KLD）：{grades}。",
    "grade_upto": "{limit} 未満は「{name}」",
    "grade_above": "それ以上は「{name}」",
    "method_speed": "速度とメモリ：{runtime}、{cpu}、{threads} スレッド。1 回の慣らし運転のあと {repeats} 回測った中央値です。"
    "{prompt} トークンの一括入力と、{new} トークンの逐次生成を、float32 のキャッシュ、flash attention なしで測りました。"
    "このマシンでの値なので、ファイルどうしの比較にだけお使いください。",
    "method_no_speed": "速度とメモリは測定していません：{why}。",
    "note_size": "ファイル全体のサイズ（10 進の単位）。重みあたりビット数は、ヘッダーを含む全ビット数を重みの数で割ったものです。",
    "note_memory": "ファイルを読み込み、入力を 1 回処理したプロセスの常駐メモリで、何も差し引いていません。そのうち約 {empty} は"
    "読み込み前のプロセス自体の分です。",
    "note_quantize": "読み込み、量子化、書き出しにかかった CPU 時間です。一度に作ったファイルどうしでは読み込みを分け合っています。",
    "reproduce": "同じ測定をするには",
    "reproduce_lead": "同じコマンドを実行すると、1 バイトも違わないファイルと、同じ KL ダイバージェンスが得られます。",
    "made_by": "作成：llm-quantize {version}",
    "made_on": "、{date}",
    "source_hash": "元モデル：{source}、フィンガープリント {hash}",
    "revision": "リビジョン {revision}",
    "notes": "補足",
    "markdown_lead": "llm-quantize {version} で、{names} の {tokens} トークン"
    "（{context} トークンの窓 {windows} 個）について測定しました。",
}

LABELS = {"en": _EN, "ja": _JA}

_GRADES_JA = {
    "indistinguishable": "見分けがつかない",
    "excellent": "優秀",
    "good": "良好",
    "noticeable loss": "劣化がわかる",
    "heavy loss": "劣化が大きい",
    "damaged": "壊れている",
}


def labels(lang: str) -> dict[str, str]:
    """The words of one language. Raises UsageError for a language that is not here."""
    if lang not in LABELS:
        raise UsageError("no report in this language", expected=", ".join(LANGUAGES), found=lang)
    return LABELS[lang]


def grade_name(name: str, lang: str) -> str:
    """A grade of ``evaluation.quality`` in the reader's language; an unknown one as it is."""
    return _GRADES_JA.get(name, name) if lang == "ja" else name
