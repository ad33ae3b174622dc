"""The fixtures that users get."""


def test_fixtures_for_users(pytester, programs):
    pytester.makepyfile(
        """
        from dask_imgread import ImageReaderStage, partition_shards, read_bag

        def test_cpu(make_shards, imgread_client):
            bag = read_bag(make_shards(shards=2, images_per_shard=3))
            assert bag.map(lambda b: b.num_items).sum().compute() == 6

        def test_shares(make_shards, imgread_gpu_client):
            reader = ImageReaderStage()
            annotations = reader.annotations(imgread_gpu_client)
            assert annotations == {"resources": {"GPU": 0.25}}
            tasks = partition_shards(make_shards())
            futures = imgread_gpu_client.map(reader, tasks, **annotations)
            results = imgread_gpu_client.gather(futures)
            assert sum(batch.num_items for result in results for batch in result) == 16
        """
    )
    pytester.run(programs / "python", "-m", "pytest", "-q").assert_outcomes(passed=2)
